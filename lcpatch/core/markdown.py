"""Generated parts of a Markdown file: what stands between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

from pathlib import Path


def with_block(path: Path, name: str, content: str) -> str:
    """The text of `path` with `content` between the markers of `name`.

    Raises:
        ValueError: the file does not have both markers once, in order.
    """
    text, begin, end = path.read_text(encoding="utf-8"), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must have one {begin} and, after it, one {end}: the table goes between them")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
