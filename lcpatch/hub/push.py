"""Publish a patched model: saved whole first, then one commit."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from .errors import sentence
from .readme import write_readme
from .save import patch_of, save_pretrained
from .sidecar import LOGITS_FILE

REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_*", "config.json", LOGITS_FILE]
"""What an earlier push may have left that would no longer belong to the model: removed in the same commit."""


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


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Push:
    """Save a patched model or adapter and push it to the Hub in one commit. A README.md that is there already stays.

    Args:
        model: what `lcpatch.apply` patched.
        repo_id: "user/name"; made if it does not exist.
        private: whether a new repository is private.
        revision: the branch; made if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        token: a token, False for none, None for the one that `hf auth login` stored.
        commit_message: default: names the method.
        dry_run: save and list the files, and talk to nobody.
        tokenizer: pushed along.
        **kwargs: for `lcpatch.save_pretrained`.

    Raises:
        ValueError: the model is not patched, cannot be saved so, or the repository's name is not a valid one.
        HubError: the Hub refused or failed; the saved files are kept, and the message says where. Push again to repeat.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    patch = patch_of(model)
    folder = Path(tempfile.mkdtemp(prefix="lcpatch-push-"))
    keep = False
    try:
        save_pretrained(model, folder, tokenizer=tokenizer, **kwargs)
        write_readme(folder, repo_id, patch)
        pushed = Push(repo_id, {name: file.stat().st_size for name, file in _files(folder).items()})
        if dry_run:
            return pushed
        keep = True
        message = commit_message or f"Model patched with {patch.method} by lcpatch"
        with sentence(f"push to {repo_id}", token, f". The saved files are whole in {folder}"):
            info = _upload(folder, repo_id, private, revision, create_pr, token, message)
        keep = False
        return Push(repo_id, pushed.files, info.oid, info.commit_url, info.pr_url)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
    message: str,
) -> Any:
    """One commit of the folder's files. `upload_folder` may make several, and a reader would find half a model."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)
    ours = {name: f for name, f in _files(folder).items() if name != "README.md" or name not in there}
    stale = [name for name in there if name not in ours and any(fnmatch(name, pattern) for pattern in REPLACED)]
    operations = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, file) for name, file in ours.items()]
    return api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, token=token
    )


def _files(folder: Path) -> dict[str, Path]:
    """The folder's files by their names in a repository."""
    return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
