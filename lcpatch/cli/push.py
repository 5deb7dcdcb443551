"""`lcpatch push WHAT REPO`: publish what lies on disk, or a cache for `generate(custom_generate=…)`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._push import add_target, say

HINT = (
    "WHAT is a folder that lcpatch saved (a model or an adapter), a file that `cache.save` wrote, or the name of a "
    "cache: then a repository for `generate(custom_generate=REPO)` is made, and its options follow as `--name value`. "
    "The token is that of `hf auth login`, or HF_TOKEN."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("push", help="push a saved model, a cache or a custom_generate", epilog=HINT)
    parser.add_argument("what", metavar="WHAT", help="a folder, a cache's file, or a cache's name")
    parser.add_argument("repo_id", metavar="REPO", help="user/name; made if it does not exist")
    parser.add_argument("--report", type=Path, metavar="FILE", help="for the card: report.json of `lcpatch eval`")
    parser.add_argument("--about", type=Path, metavar="FILE", help="for the card: see `lcpatch card --help`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a custom_generate there, and push nothing")
    add_target(parser)
    parser.set_defaults(run=run, takes_options=True)


def run(args: argparse.Namespace) -> None:
    from ..hub import push_generate
    from ..hub.cache import push_cache
    from ..hub.saved import push_saved
    from ..hub.upload import Target

    path = Path(args.what)
    if args.options and path.exists():
        raise ValueError(f"--{next(iter(args.options))} is an option of a cache, but {path} is a file or folder")
    where = {n: getattr(args, n) for n in ("private", "revision", "create_pr", "token")}
    if path.is_dir():
        say(push_saved(path, Target(args.repo_id, **where), report=args.report, about=args.about, dry_run=args.dry_run))
    elif path.is_file() or path.suffix == ".safetensors":
        say(push_cache(path, Target(args.repo_id, **where), about=args.about, dry_run=args.dry_run))
    elif args.out:
        _export(args)
    else:
        say(push_generate(args.what, args.repo_id, about=args.about, dry_run=args.dry_run, **where, **args.options))


def _export(args: argparse.Namespace) -> None:
    from ..hub import export_generate

    files = export_generate(args.what, args.out, repo_id=args.repo_id, about=args.about, **args.options)
    print("written: " + ", ".join(map(str, files)))
