"""Publish a patched model: saved whole first, with its card, then one commit."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..eval.saved import read_report
from ..patching.apply import unwrap
from .about import About
from .card import PICTURES, Subject, make_card
from .card_files import README, is_ours, write_card
from .errors import sentence
from .save import patch_of, save_pretrained
from .sidecar import LOGITS_FILE

if TYPE_CHECKING:
    from ..eval.report import Report

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
    report: Any = None,
    about: Any = None,
    **kwargs: Any,
) -> Push:
    """Save a patched model or adapter and push it to the Hub in one commit, with a card.

    A README.md that is there already stays, unless it is a card of an earlier push that nobody changed.

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
        report: what `lcpatch eval` measured, for the card: its `report.json`, its folder, or a `lcpatch.eval.Report`.
        about: what else the card says: a mapping, or a YAML file, with any of `base_model`, `base_model_relation`,
            `license`, `language`, `datasets`, `tags`, `training`, `limits`, `citation`.
        **kwargs: for `lcpatch.save_pretrained`.

    Raises:
        ValueError: the model is not patched, cannot be saved so, or the repository's name, `report` or `about` is not
            a valid one.
        HubError: the Hub refused or failed; the saved files are kept, and the message says where. Push again to repeat.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    patch = patch_of(model)
    about = About.of(about)
    report = None if report is None else read_report(report)
    folder = Path(tempfile.mkdtemp(prefix="lcpatch-push-"))
    keep = False
    try:
        save_pretrained(model, folder, tokenizer=tokenizer, **kwargs)
        _write_card(model, folder, repo_id, revision if not create_pr else None, about, report)
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


def _write_card(
    model: nn.Module, folder: Path, repo_id: str, revision: str | None, about: About, report: Report | None
) -> None:
    (folder / README).unlink(missing_ok=True)  # PEFT writes an empty one
    config = unwrap(model).config
    known = {**config.to_dict(), "_name_or_path": config._name_or_path}
    write_card(folder, *make_card(Subject.of(folder, repo_id, known, revision), about, report))


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
    ours, replaced = _files(folder), REPLACED
    if README in there and not _is_ours(api, repo_id, revision):
        ours = {name: file for name, file in ours.items() if name != README and not name.startswith(f"{PICTURES}/")}
    else:
        replaced = [*REPLACED, f"{PICTURES}/*.png"]
    stale = [name for name in there if name not in ours and any(fnmatch(name, pattern) for pattern in replaced)]
    operations = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, file) for name, file in ours.items()]
    return api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, token=token
    )


def _is_ours(api: Any, repo_id: str, revision: str | None) -> bool:
    """Whether the README.md in the repository is a card that may be replaced."""
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(repo_id, README, revision=revision, local_dir=folder)
        return is_ours(Path(file).read_text(encoding="utf-8", errors="replace"))


def _files(folder: Path) -> dict[str, Path]:
    """The folder's files by their names in a repository."""
    return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
