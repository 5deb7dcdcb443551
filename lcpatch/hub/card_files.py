"""A card on disk: `README.md`, its pictures, and a preview as HTML. A README that somebody wrote is never replaced."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

README = "README.md"
SIGNATURE = re.compile(r"\n<!-- made by lcpatch, sha256 of the text above: ([0-9a-f]{64}) -->\n$")
DPI = 110
"""Of a card's pictures: about the width of a page on the Hub."""

_STYLE = """
body { max-width: 56rem; margin: 2rem auto; padding: 0 1.5rem; font: 16px/1.6 system-ui, sans-serif; color: #1b2733 }
pre { background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: 85% }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace }
:not(pre) > code { background: #f4f6f8; padding: .1em .3em }
table { border-collapse: collapse; font-size: 90%; display: block; overflow-x: auto }
th, td { border: 1px solid #e3e8ee; padding: .3rem .7rem; text-align: left }
th { background: #f4f6f8 }
img { max-width: 100% }
h2 { border-bottom: 1px solid #e3e8ee; padding-bottom: .2rem; margin-top: 2.2rem }
a { color: #2166ac }
details { color: #6d7884; font-size: 90% }
"""


def signed(card: str) -> str:
    """`card` with a last line that tells it from one that a hand has changed."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- made by lcpatch, sha256 of the text above: {digest} -->\n"


def is_ours(text: str) -> bool:
    """Whether `text` is a card that lcpatch made and nobody changed."""
    text = text.replace("\r\n", "\n")
    found = SIGNATURE.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def write_card(folder: Path, card: str, pictures: Mapping[str, Any]) -> list[Path]:
    """Write a card and its pictures into `folder`; gives their paths.

    Raises:
        ValueError: there is a README.md that lcpatch did not make, or that was changed since.
    """
    readme = folder / README
    if readme.is_file() and not is_ours(readme.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{readme} was written or changed by hand, and stays: take another folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        (folder / name).parent.mkdir(exist_ok=True)
        figure.savefig(folder / name, dpi=DPI)
    readme.write_text(signed(card), encoding="utf-8", newline="\n")
    return [readme, *(folder / name for name in pictures)]


def parts(card: str) -> tuple[str, str]:
    """A card's metadata and its Markdown."""
    _, head, text = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return head, text


def to_html(card: str, title: str) -> str:
    """A page that shows `card` about as the Hub does.

    Raises:
        ImportError: markdown-it-py is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("the HTML preview needs markdown-it-py: pip install 'lcpatch[cards]'") from error

    head, text = parts(card)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<details><summary>metadata</summary><pre>{escape(head)}</pre></details>\n"
        f"{body}</html>\n"
    )
