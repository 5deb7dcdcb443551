"""`lcpatch card MODEL`: the model card that a push would bring, as Markdown and as a page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HINT = (
    "FILE is YAML with any of: base_model, base_model_relation, license, language, datasets, tags, training (a text or "
    "settings), limits (a list of sentences), citation (BibTeX)."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("card", help="preview a saved model's card", epilog=HINT)
    parser.add_argument("model", metavar="MODEL", help="a folder that lcpatch saved, or an id on the Hub")
    parser.add_argument("--report", type=Path, metavar="FILE", help="report.json of `lcpatch eval`, or its folder")
    parser.add_argument("--about", type=Path, metavar="FILE", help="licence, data, training, limits")
    parser.add_argument("--repo-id", metavar="ID", help="what the model will be called (default: me/ and the folder)")
    parser.add_argument("--out", type=Path, default=Path("card"), metavar="FOLDER", help="default: card")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..hub import preview_card

    written = preview_card(args.model, args.out, repo_id=args.repo_id, report=args.report, about=args.about)
    print("written: " + ", ".join(map(str, written)))
