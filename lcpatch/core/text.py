"""Text from files and folders, or from what every machine has: Python's own documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def read_texts(paths: Sequence[str | Path] | None) -> tuple[list[str], str]:
    """The documents in files and folders (every `.txt`, `.md` and `.rst` below), and what to call them.

    Without paths: Python's own documentation, which every machine has.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file that is empty or no text, or a folder without text files.
    """
    if not paths:
        from pydoc_data.topics import topics

        return ["\n\n".join(topics[name] for name in sorted(topics))], "pydoc_data.topics"
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".rst") and p.is_file())
            if not found:
                raise ValueError(f"{path} has no .txt, .md or .rst file in it; name the files themselves with --text")
            files += found
        else:
            files.append(path)
    return [read_text(path) for path in files], ", ".join(Path(path).name for path in paths)


def read_text(path: Path) -> str:
    """One file of UTF-8 text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, or one that is not text.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or name other files") from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL bytes, so it is not a text; name other files")
    if not text.strip():
        raise ValueError(f"{path} is empty; name a file with text in it")
    return text
