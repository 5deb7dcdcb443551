"""Push a folder that `lcpatch.save_pretrained` wrote, or that a failed push kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .about import About
from .card import Subject, make_card
from .card_files import README, is_ours, write_card
from .push import REPLACED
from .upload import Push, Target, files_in, publish


def push_saved(
    folder: str | Path, target: Target, *, report: Any = None, about: Any = None, dry_run: bool = False
) -> Push:
    """Push the folder's model or adapter in one commit. A README.md in it that somebody wrote goes along as it is.

    Args:
        folder: what `lcpatch.save_pretrained` wrote.
        target: where to push.
        report, about: for the card, as in `lcpatch.push_to_hub`.
        dry_run: list the files, and talk to nobody.

    Raises:
        ValueError: no patch there, a link out of the folder, a pickle, or a report or `about` that is not valid.
        HubError: the Hub refused or failed.
    """
    folder, about = Path(folder), About.of(about)
    found = files_in(folder)
    if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]:
        raise ValueError(f"{pickles[0]} is a pickle, which lcpatch does not publish: save the model as safetensors")
    revision = None if target.create_pr else target.revision
    subject = Subject.of(folder, target.repo_id, revision=revision)
    readme = folder / README
    theirs = readme.is_file() and not is_ours(readme.read_text(encoding="utf-8", errors="replace"))
    if theirs and (report is not None or about != About()):
        raise ValueError(f"{readme} was written by hand, and stays: a report or `about` would go into a card of ours")
    card = None if theirs else make_card(subject, about, report)

    def fill(copy: Path) -> None:
        for name, file in found.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy / name)
        if card is not None:
            write_card(copy, *card)

    message = f"Model patched with {subject.patch.method} by lcpatch"
    return publish(fill, target, message, replaced=REPLACED, dry_run=dry_run)
