"""The `lcpatch` command: one file a verb, found by scanning this folder. A file whose name starts with `_` is no verb.

A verb's file has `add_parser(subparsers)` and `run(args)`. It imports torch and the like inside `run`, so that `--help`
answers at once. A verb that sets `takes_options=True` on its parser gets what argparse does not know as `args.options`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shlex
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..core.program import USER_ERRORS, sentence, show_warning
from ._options import parse_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0, 2 for a user's error, 130 after Ctrl-C."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if "--traceback" in rest:  # given to a verb of a verb
        rest.remove("--traceback")
        args.traceback = True
    args.command = shlex.join(["lcpatch", *(sys.argv[1:] if argv is None else argv)])  # reports and cards repeat it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            if getattr(args, "takes_options", False):
                args.options = parse_options(rest)
            elif rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            status = args.run(args) or 0
            sys.stdout.flush()  # a closed pipe shows here, not when Python exits
            return status
    except KeyboardInterrupt:
        print("\nlcpatch: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lcpatch methods | head`: whoever read us has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if args.traceback:
            raise
        print(f"lcpatch {args.verb}: {sentence(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lcpatch", description="Patch any Hugging Face causal LM for long context.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lcpatch {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}").add_parser(subparsers)
    for verb in subparsers.choices.values():
        verb.allow_abbrev = False  # `--option` of a method must not be taken for the start of one of ours
        verb.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser
