"""The file of a saved cache: safetensors with a JSON header, written whole or not at all, read as one, and checked.

Bits flip on disks and on the way: the header holds a checksum (CRC-32) of every tensor, and lies beside its own. They
tell of accidents; who forges a file makes them fit, so nothing in it is trusted for them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.disk import replacing
from ..core.errors import StoreError

FORMAT = 2
"""Version of the header. A reader refuses a newer one; the first had no checksums."""

KEY = "lcpatch_cache"
CHECKSUM = "lcpatch_cache_crc32"  # of the header
ATTEMPTS = 100  # to open a file that is being replaced; each takes as long as a rename, so the second succeeds
MAX_HEADER = 1 << 20  # kilobytes are usual; JSON takes up to 50 times its size in memory


def write(tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> None:
    """Write all of it or nothing: who reads meanwhile gets the old file or the new one.

    Raises:
        StoreError: it cannot be written; what was there is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata_of(tensors, header))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be written, what was there is untouched: {error}") from error


def metadata_of(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, str]:
    """The header with its format and checksums, as safetensors takes it."""
    sums = {name: checksum(x) for name, x in tensors.items()}
    text = json.dumps({"format": FORMAT, **header, "checksums": sums})
    return {KEY: text, CHECKSUM: _hex(text.encode())}


def checksum(x: Tensor) -> str:
    """Of the bytes of a contiguous tensor in host memory."""
    return _hex(x.flatten().view(torch.uint8).numpy())


def _hex(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


class PrefixFile:
    """A file that is open, with its header: the kinds of its values checked, the values not.

    Args:
        file: as safetensors opens it.
        path: of it, for messages.

    Raises:
        StoreError: it holds no cache of ours, or its header is damaged.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.path, self._file = path, file
        self.header = _header(file.metadata() or {}, path)
        self.checksums: dict[str, Any] | None = self.header.get("checksums")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def tensor(self, name: str, verify: bool) -> Tensor:
        """The tensor, mapped into memory; to `verify` it reads all of it, where the file has checksums.

        Raises:
            StoreError: it is not what was saved.
        """
        x = self._file.get_tensor(name)
        if verify and self.checksums is not None and self.checksums.get(name) != checksum(x):
            raise StoreError(f"{self.path} is damaged: its tensor {name!r} is not what was saved; save it anew")
        return x


def read_header(path: str | Path) -> dict[str, Any]:
    """What the file says about its cache and the model; no model is needed.

    Raises:
        StoreError: no such file, or one that holds no cache of ours.
    """
    with reading(Path(path)) as file:
        return file.header


@contextmanager
def reading(path: Path) -> Iterator[PrefixFile]:
    """The file, open for reading.

    Raises:
        StoreError: no such file, a broken one, or one that holds no cache of ours.
    """
    try:
        with _opened(path) as file:
            yield PrefixFile(file, path)
    except (SafetensorError, OSError) as error:
        reason = "there is no such file" if not path.exists() else f"not a safetensors file, or cut off ({error})"
        raise StoreError(f"{path}: {reason}") from error


def _opened(path: Path) -> Any:
    """The file, open for reading: one file, though a writer may replace it meanwhile.

    safetensors opens a path twice, for the header and for the data, which then may belong to two different files.
    """
    for _ in range(ATTEMPTS):
        before = _stamp(path)
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except RuntimeError:  # torch: the second file is smaller than the first
            if _stamp(path) == before:
                raise
            continue
        if _stamp(path) == before:
            return file
    raise StoreError(f"{path} is replaced by others all the time; try again")


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells a file from the one that takes its place."""
    held = os.stat(path)
    return held.st_ino, held.st_mtime_ns, held.st_size


def _header(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    text, known = metadata.get(KEY), metadata.get(CHECKSUM)
    if text is None:
        raise StoreError(f"{path} holds no cache of lcpatch's: `cache.save(path)` writes one")
    if len(text) > MAX_HEADER:
        raise StoreError(f"{path}: its header is larger than {MAX_HEADER} bytes: refused")
    if known not in (None, _hex(text.encode())):
        raise StoreError(f"{path} is damaged: its header is not what was saved; save it anew")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise StoreError(f"{path}: its header is not one that `cache.save` writes")
    if not 1 <= header["format"] <= FORMAT:
        raise StoreError(
            f"{path} has format {header['format']}; this lcpatch reads up to {FORMAT}: pip install -U lcpatch"
        )
    kinds = {"cache": str, "options": dict, "model": dict, "layers": list}
    if header["format"] > 1:
        kinds["checksums"] = dict
        if known is None:
            raise StoreError(f"{path} is damaged: the checksum of its header is gone; save it anew")
    for name, kind in kinds.items():
        if not isinstance(header.get(name), kind):
            raise StoreError(f"{path}: {name!r} is missing from its header, or is no {kind.__name__}")
    return header
