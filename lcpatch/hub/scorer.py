"""Trained page scorers of retrieval caches on the Hub: a small safetensors file and a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..caches.scorers import Bookmarks
from .about import About
from .card_files import write_card
from .escape import Ready, argument
from .load import file_of
from .template import metadata, render
from .upload import Push, Target, publish

SCORER_FILE = "scorer.safetensors"
"""What a scorer is called in a repository."""


def load_scorer(
    id_or_path: str | Path,
    model: nn.Module,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Bookmarks:
    """The scorer that `Bookmarks.save` or `lcpatch.push_to_hub` wrote: `RetrievalCache(model, scorer=scorer)`.

    Args:
        id_or_path: the file, a folder that holds it, or a repository on the Hub.
        model: the model that it is for; only its geometry can be compared.
        revision: branch, tag or commit of the repository.
        token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Raises:
        LcpatchError: no such file, or not one of a scorer.
        ValueError: a scorer of another geometry.
        HubError: the Hub did not give the file; the message says why and what to do.
    """
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    scorer = Bookmarks.load(file_of(id_or_path, SCORER_FILE, revision, hub))
    found, wanted = tuple(scorer.query.shape), tuple(Bookmarks.of(model).query.shape)
    if found != wanted:
        names = "layers, KV heads and head dim"
        raise ValueError(f"{id_or_path} is a scorer for {names} {found[:3]}; this model has {wanted[:3]}")
    return scorer


def push_scorer(
    scorer: Bookmarks, target: Target, *, about: Any = None, message: str | None = None, dry_run: bool = False
) -> Push:
    """Push a scorer in one commit with a card; see `lcpatch.push_to_hub`."""
    about = About.of(about)

    def fill(folder: Path) -> None:
        scorer.save(folder / SCORER_FILE)
        write_card(folder, scorer_card(scorer, target, about), {})

    return publish(fill, target, message or "Page scorer by lcpatch", dry_run=dry_run)


def scorer_card(scorer: Bookmarks, target: Target, about: About) -> str:
    """The card of a scorer."""
    data = {
        "license": about.license,
        "language": list(about.language),
        "base_model": about.base_model,
        "tags": list(dict.fromkeys(["lcpatch", "kv-cache", "retrieval", "long-context", *about.tags])),
        "datasets": list(about.datasets),
    }
    layers, heads, _, dim = scorer.query.shape
    on_branch = target.revision is not None and not target.create_pr
    return render(
        "scorer",
        metadata=metadata(data),
        name=target.repo_id,
        repo_id=Ready(target.repo_id),
        revision=argument("revision", target.revision if on_branch else None),
        base=about.base_model,
        layers=layers,
        heads=heads,
        dim=dim,
        about=about,
    )
