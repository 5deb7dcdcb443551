"""What the verbs that push have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hub import Push


def add_target(parser: argparse.ArgumentParser, revision: bool = True) -> None:
    """Options of where a push goes. A token is not among them: a command line is seen by every user of a machine."""
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    if revision:
        parser.add_argument("--revision", metavar="BRANCH", help="made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="list the files and talk to nobody")
    parser.set_defaults(token=None)  # that of `hf auth login`, or HF_TOKEN


def say(push: Push) -> None:
    """What was pushed or, in a dry run, would be."""
    for name, size in push.files.items():
        print(f"{size:12,}  {name}")
    total = sum(push.files.values()) / 2**20
    done = push.pull_request or push.url
    print(f"{len(push.files)} files, {total:.1f} MiB " + (f"pushed: {done}" if done else f"would go to {push.repo_id}"))
