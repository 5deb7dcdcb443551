"""`lcpatch methods`: what is registered, as a table; the README's table comes from here."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..patterns import AttentionPattern

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
HEADER = ("Method", "What a token attends to", "Paper", "Trains", "Runs", "Options and their defaults")
PHASES = {"train": ("sparse", "dense"), "always": ("sparse", "sparse"), "never": ("dense", "dense")}
"""What a method's default mode means while the model trains, and after."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("methods", help="list the attention methods, or explain one")
    parser.add_argument("method", nargs="?", metavar="METHOD", help="explain this one: its rule and its options")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--markdown", action="store_true", help="print the table as the README shows it")
    what.add_argument("--write", metavar="README", type=Path, help=f"put it between {BEGIN} and {END} of this file")
    what.add_argument("--check-readme", metavar="README", type=Path, help="fail if this file's table is out of date")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..patterns import patterns

    if args.method:
        print(_explain(patterns.get(args.method)))
    elif args.markdown:
        print(_markdown())
    elif args.write:
        args.write.write_text(_updated(args.write), encoding="utf-8")
    elif args.check_readme:
        if _updated(args.check_readme) != args.check_readme.read_text(encoding="utf-8"):
            command = f"lcpatch methods --write {args.check_readme}"
            print(f"the table of methods in {args.check_readme} is out of date; run: {command}", file=sys.stderr)
            return 1
    else:
        print(_table())
    return 0


def _rows(link: str) -> list[tuple[str, ...]]:
    from ..patterns import patterns

    rows = []
    for name, cls in patterns.all().items():
        options = ", ".join(f"{key}={value!r}" for key, value in cls().to_options().items())
        rows.append((name, cls.title, link.format(cls.paper), *PHASES[cls.default_mode], options))
    return rows


def _markdown() -> str:
    link = "[{0}](https://arxiv.org/abs/{0})"
    rows = [(f"`{name}`", *middle, f"`{options}`") for name, *middle, options in _rows(link)]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _updated(readme: Path) -> str:
    """The text of `readme` with the table of today."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must have one {BEGIN} and, after it, one {END}: the table goes between them")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n{_markdown()}\n{after}"


def _table() -> str:
    lines = []
    for name, title, paper, trains, runs, options in _rows("https://arxiv.org/abs/{0}"):
        lines += [f"{name:8}{title}", f"        trains {trains}, runs {runs}   {paper}", f"        {options}", ""]
    return "\n".join([*lines, "lcpatch methods METHOD explains one of them."])


def _explain(cls: type[AttentionPattern]) -> str:
    """The method's own documentation: its file's, then its class's."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return "\n\n".join([f"{cls.name}: {module}", f"https://arxiv.org/abs/{cls.paper}", inspect.getdoc(cls) or ""])
