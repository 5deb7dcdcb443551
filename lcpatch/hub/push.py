"""Publish a patched model, an adapter, a cache or a scorer: saved whole first, with its card, then one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..caches import LongCache
from ..caches.scorers import Bookmarks
from ..eval.saved import read_report
from ..hf.models import unwrap
from .about import About
from .cache import push_cache
from .card import Subject, make_card
from .card_files import write_card
from .save import patch_of, save_pretrained
from .scorer import push_scorer
from .sidecar import SINKS_FILE
from .upload import Push, Target, publish

if TYPE_CHECKING:
    from ..eval.report import Report

REPLACED = ["model*.safetensors", "model.safetensors.index.json", "*adapter_*", "config.json", SINKS_FILE]
"""What an earlier push may have left that would no longer belong to the model."""


def push_to_hub(
    model: nn.Module | LongCache,
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
    """Save a patched model, an adapter, a cache or a scorer and push it to the Hub in one commit, with a card.

    A README.md that is there already stays, unless it is a card of an earlier push that nobody changed.

    Args:
        model: what `lcpatch.apply` patched; or a cache, which `lcpatch.load_cache` loads from there; or trained
            `caches.scorers.Bookmarks`, which `lcpatch.hub.load_scorer` loads.
        repo_id: "user/name"; made if it does not exist.
        private: whether a new repository is private.
        revision: the branch; made if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        token: a token, False for none, None for the one that `hf auth login` stored.
        commit_message: default: names the method.
        dry_run: save and list the files, and talk to nobody.
        tokenizer: pushed along; of a cache, only what tells it from another.
        report: what `lcpatch eval` measured, for the card: its `report.json`, its folder, or a `lcpatch.eval.Report`.
        about: what else the card says: a mapping, or a YAML file, with any of `base_model`, `base_model_relation`,
            `license`, `language`, `datasets`, `tags`, `training`, `limits`, `citation`.
        **kwargs: for `lcpatch.save_pretrained`.

    Raises:
        StoreError: a cache that cannot be saved.
        ValueError: the model is not patched, cannot be saved so, or the repository's name, `report` or `about` is not
            a valid one.
        HubError: the Hub refused or failed; the saved files are kept, and the message says where. Push again to repeat.
    """
    target = Target(repo_id, "model", private, revision, create_pr, token)
    if isinstance(model, LongCache | Bookmarks):
        if report is not None or kwargs:
            raise ValueError(f"{['report', *kwargs][report is None]} is for a model; a cache has its own file and card")
        said = {"about": about, "message": commit_message, "dry_run": dry_run}
        if isinstance(model, Bookmarks):
            return push_scorer(model, target, **said)
        return push_cache(model, target, tokenizer=tokenizer, **said)
    patch = patch_of(model)
    about = About.of(about)
    report = None if report is None else read_report(report)

    def fill(folder: Path) -> None:
        save_pretrained(model, folder, tokenizer=tokenizer, **kwargs)
        _write_card(model, folder, target, about, report)

    message = commit_message or f"Model patched with {patch.method} by lcpatch"
    return publish(fill, target, message, replaced=REPLACED, dry_run=dry_run)


def _write_card(model: nn.Module, folder: Path, target: Target, about: About, report: Report | None) -> None:
    config = unwrap(model).config
    known = {**config.to_dict(), "_name_or_path": config._name_or_path}
    subject = Subject.of(folder, target.repo_id, known, None if target.create_pr else target.revision)
    write_card(folder, *make_card(subject, about, report))
