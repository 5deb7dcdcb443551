"""One commit of a folder's files to the Hub, whatever they are.

`upload_folder` of huggingface_hub may make several commits, and a reader would find half of the files.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..core.errors import HubError
from ..core.flags import check_flag
from .card_files import README, is_ours
from .errors import sentence

PICTURES = "card"
"""The folder of a card's pictures."""


@dataclass(frozen=True)
class Target:
    """Where a push goes.

    Args:
        repo_id: "user/name"; made if it does not exist.
        kind: "model" or "kernel".
        private: whether a new repository is private.
        revision: the branch; made if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        token: a token, False for none, None for the one that `hf auth login` stored.
    """

    repo_id: str
    kind: str = "model"
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = None

    def __post_init__(self) -> None:
        check_flag("create_pr", self.create_pr)
        if self.private is not None:
            check_flag("private", self.private)


@dataclass(frozen=True)
class Push:
    """What was pushed or, in a dry run, would be.

    Args:
        repo_id: the repository.
        files: size in bytes of each file, by name.
        commit: the commit's hash; None in a dry run.
        url: the commit's address; None in a dry run.
        pull_request: the pull request's address, if one was opened.
    """

    repo_id: str
    files: dict[str, int]
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None


def publish(
    fill: Callable[[Path], None], target: Target, message: str, *, replaced: Sequence[str] = (), dry_run: bool = False
) -> Push:
    """Write the files into a temporary folder and push them. If the Hub fails, the folder stays.

    Args:
        fill: writes the files into the folder that it is given.
        target: where to push.
        message: of the commit.
        replaced: patterns of files that an earlier push may have left and that would no longer belong to these; they
            are removed in the same commit.
        dry_run: list the files, and talk to nobody.

    Raises:
        ValueError: the repository's name is not a valid one, `dry_run` is no bool; and what `fill` raises.
        HubError: the Hub refused or failed; the files are kept, and the message says where.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(target.repo_id)
    check_flag("dry_run", dry_run)
    folder = Path(tempfile.mkdtemp(prefix="lcpatch-push-"))
    keep = False
    try:
        fill(folder)
        planned = Push(target.repo_id, {name: file.stat().st_size for name, file in files_in(folder).items()})
        if dry_run:
            return planned
        keep = True
        pushed = upload(folder, target, message, replaced, f". The saved files are whole in {folder}")
        keep = False
        return pushed
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def upload(folder: Path, target: Target, message: str, replaced: Sequence[str] = (), afterwards: str = "") -> Push:
    """Push the files of `folder`, as they are, in one commit.

    Args:
        afterwards: appended to the message of an error.

    Raises:
        HubError: the Hub refused or failed.
    """
    files = files_in(folder)
    with sentence(f"push to {target.repo_id}", target.token, afterwards):
        try:
            info = _commit(files, target, message, replaced)
        except ValueError as error:  # how huggingface_hub says that the Hub refused the card's metadata
            if hasattr(error, "response"):  # an answer like any other
                raise
            raise HubError(f"cannot push to {target.repo_id}: {error}{afterwards}") from error
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return Push(target.repo_id, sizes, info.oid, info.commit_url, info.pr_url)


def files_in(folder: Path) -> dict[str, Path]:
    """The folder's files by their names in a repository.

    Raises:
        ValueError: a link that leads out of the folder: what is behind it was hardly meant to be published.
    """
    root = folder.resolve()
    found = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    for name, file in found.items():
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{name} is a link out of {folder}: copy the file itself, or remove the link")
    return {name: file for name, file in found.items() if not name.startswith((".cache/", ".git/"))}


def _commit(files: dict[str, Path], target: Target, message: str, replaced: Sequence[str]) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo = HfApi(token=target.token), {"repo_id": target.repo_id, "repo_type": target.kind}
    api.create_repo(**repo, private=target.private, exist_ok=True)
    if target.revision is not None and not target.create_pr:
        api.create_branch(**repo, branch=target.revision, exist_ok=True)
    there = api.list_repo_files(**repo, revision=target.revision)
    if README in there and not _is_ours(api, repo, target.revision):  # somebody's own, and the pictures are not for it
        files = {name: file for name, file in files.items() if name != README and not name.startswith(f"{PICTURES}/")}
    else:
        replaced = [*replaced, f"{PICTURES}/*.png"]
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in replaced)]
    operations = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, file) for name, file in files.items()]
    options = {"commit_message": message, "revision": target.revision, "create_pr": target.create_pr}
    return api.create_commit(**repo, operations=operations, **options)


def _is_ours(api: Any, repo: dict[str, str], revision: str | None) -> bool:
    """Whether the README.md in the repository is a card that may be replaced."""
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(**repo, filename=README, revision=revision, local_dir=folder)
        return is_ours(Path(file).read_text(encoding="utf-8", errors="replace"))
