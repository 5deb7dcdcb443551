"""Results on disk: one JSON line each, written when it is there, so that a killed run goes on where it stopped."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ..core.difference import difference
from ..core.disk import replacing, why_unwritten
from ..core.errors import LcpatchError

SCHEMA = 1
FILE = "results.jsonl"


class Store:
    """Rows by key, in memory and, with a folder, in its `results.jsonl`.

    Args:
        folder: None: in memory only.
        header: what all rows have in common; a file that was begun with another one is refused.

    Raises:
        ValueError: a file of another run, of a newer format, or with a broken line before its last.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        self.header = {"schema": SCHEMA, **header}
        self.rows: dict[str, dict[str, Any]] = {}
        self.path = None if folder is None else folder / FILE
        if self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read(self.path) if self.path.exists() else []
        if len(lines) > 1:
            self._compare(lines[0])
            self.rows = {row["key"]: row for row in lines[1:]}
        elif lines != [self.header]:  # what was begun and measured nothing binds nobody
            self._write(self.path, b"")
            self._append(self.header)

    @classmethod
    def found_in(cls, folder: Path) -> Store:
        """What is there, by whatever settings it was measured; the folder is left as it is.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: a file of a newer format, or with a broken line before its last.
        """
        path = folder / FILE
        lines, _ = _whole_lines(path) if path.is_file() else ([], False)
        if not lines:
            raise FileNotFoundError(f"{path} is missing or empty: name the folder of what was measured as --out")
        _check_schema(path, lines[0])
        store = cls(None, {})
        store.header, store.rows = lines[0], {row["key"]: row for row in lines[1:]}
        return store

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, on disk before this returns.

        Raises:
            LcpatchError: it could not be written.
        """
        self.rows[key] = {"key": key, **row}
        if self.path is not None:
            self._append(self.rows[key])

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                whole = os.write(handle, line) == len(line)  # one call: nothing of another process lands inside
                os.fsync(handle)
            finally:
                os.close(handle)
            if not whole:  # what did fit is a line that was cut off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LcpatchError(
                f"{self.path}: a result could not be written ({why_unwritten(error, self.path.parent)}); those before "
                "it are kept. Make room, and the same command measures it again"
            ) from error

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """Every whole line; a last one that was cut off is taken out of the file."""
        rows, cut_off = _whole_lines(path)
        if cut_off:
            number = len(rows) + 1
            warnings.warn(f"{path} line {number} was cut off and is measured again; {len(rows)} are kept", stacklevel=4)
            self._write(path, b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        return rows

    def _write(self, path: Path, data: bytes) -> None:
        with replacing(path) as new:
            new.write_bytes(data)

    def _compare(self, found: dict[str, Any]) -> None:
        _check_schema(self.path, found)
        if different := difference(found, self.header):
            name, theirs, ours = different
            raise ValueError(
                f"{self.path} holds a run with {name}={theirs!r}, this one has {ours!r}: take another --out, or "
                "delete that folder"
            )


def _check_schema(path: Path | None, header: dict[str, Any]) -> None:
    if header["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {header['schema']}; this lcpatch goes on with schema {SCHEMA} only")


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The file's lines as objects, and whether one more follows that was cut off.

    Raises:
        ValueError: a broken line before the last.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None and ("schema" in row if number == 1 else "key" in row):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(
                f"{path} line {number} is no result of `lcpatch eval`; nothing was changed. Delete that line to "
                "measure it again, or take another --out"
            )
    return rows, len(rows) < len(lines)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The line's object; None if it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) else None
