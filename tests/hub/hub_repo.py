"""The repositories of the loopback Hub: a folder per commit holds all of its files, `repo.json` the branches."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any


class Repo:
    """One repository on disk."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder = name, root / name
        self.file = self.folder / "repo.json"

    def create(self, private: bool) -> None:
        self.folder.mkdir(parents=True)
        empty = "0" * 40
        (self.folder / empty).mkdir()
        self.save({"private": private, "branches": {"main": empty}, "log": [empty]})

    def load(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def save(self, data: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(data))

    def commit_of(self, revision: str) -> str | None:
        data = self.load()
        return data["branches"].get(revision) or (revision if revision in data["log"] else None)

    def files(self, commit: str) -> list[tuple[str, bytes]]:
        folder = self.folder / commit
        return [(f.relative_to(folder).as_posix(), f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()]

    def commit(self, revision: str, body: bytes, large: Path) -> str:
        """Apply NDJSON operations to the head of `revision`; `large` holds the LFS files by their hash."""
        data = self.load()
        head = data["branches"].get(revision) or data["branches"]["main"]
        new = hashlib.sha1(f"{len(data['log'])} {head}".encode() + body).hexdigest()
        shutil.copytree(self.folder / head, self.folder / new)
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                file = self.folder / new / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                file = self.folder / new / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(large / value["oid"], file)
            elif operation["key"] == "deletedFile":
                (self.folder / new / value["path"]).unlink()
        data["branches"][revision] = new
        data["log"].append(new)
        self.save(data)
        return new
