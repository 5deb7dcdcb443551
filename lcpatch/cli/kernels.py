"""`lcpatch kernels export | push`: publish `lcpatch_kernels` as a kernel of the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._push import add_target, say


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("kernels", help="export or push the kernels as a kernel of the Hub (a checkout)")
    verbs = parser.add_subparsers(dest="what", metavar="VERB", required=True)
    export = verbs.add_parser("export", help="write the published layout, as Hugging Face's kernels package loads it")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="does not exist yet, or is empty")
    export.add_argument("--repo-id", metavar="ID", help="for its card (default: that of kernels/build.toml)")
    export.set_defaults(run=run_export)
    push = verbs.add_parser("push", help="export, and push to a kernel repository on the version's branch")
    push.add_argument("--repo-id", metavar="ID", help="default: that of kernels/build.toml")
    add_target(push, revision=False)
    push.set_defaults(run=run_push)


def run_export(args: argparse.Namespace) -> None:
    from ..hub.kernels import export_kernels

    files = export_kernels(args.out, repo_id=args.repo_id)
    print(f"{args.out}: {len(files)} files, {sum(files.values()) / 1024:.0f} KiB")


def run_push(args: argparse.Namespace) -> None:
    from ..hub.kernels import push_kernels

    settings = {"private": args.private, "create_pr": args.create_pr, "token": args.token, "dry_run": args.dry_run}
    say(push_kernels(args.repo_id, **settings))
