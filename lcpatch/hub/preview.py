"""Look at a card before it is pushed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .about import About
from .card import Subject, make_card
from .card_files import to_html, write_card
from .load import folder_of


def preview_card(
    id_or_path: str | Path,
    out: str | Path,
    *,
    repo_id: str | None = None,
    report: Any = None,
    about: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[Path]:
    """Write the card of a saved model into `out`: README.md, its pictures, and `preview.html`. No weights are read.

    Args:
        id_or_path: a folder that `lcpatch.save_pretrained` wrote, or a repository on the Hub.
        out: a folder; made if it does not exist. A README.md there that lcpatch did not make stops this.
        repo_id: what the model will be called; default: the repository, or "me/" and the folder's name.
        report, about: as in `lcpatch.push_to_hub`.
        revision, token: of the repository.

    Returns:
        The files.

    Raises:
        ValueError: no patch there, or a broken one; a report or `about` that is not valid; a README.md to keep.
        HubError: the Hub did not give the files.
        ImportError: markdown-it-py is not installed.
    """
    from huggingface_hub.utils import validate_repo_id

    folder = folder_of(id_or_path, revision, ["*.json"], {"token": token})
    local = Path(id_or_path).is_dir()
    name = re.sub(r"[^\w.-]+", "-", Path(id_or_path).resolve().name, flags=re.ASCII).strip("-.") or "model"
    repo_id = repo_id or (f"me/{name}" if local else str(id_or_path))
    validate_repo_id(repo_id)
    about = About.of(about)
    card, pictures = make_card(Subject.of(folder, repo_id, revision=revision), about, report)
    page = to_html(card, repo_id)
    written = write_card(Path(out), card, pictures)
    preview = Path(out) / "preview.html"
    preview.write_text(page, encoding="utf-8")
    return [*written, preview]
