"""Records of equal size on a disk: a file, and host memory before it. Records are only added.

The file is scratch: it has no name (it is unlinked as soon as it is open), so a process that dies leaves nothing
behind, and two processes on one folder cannot meet. Its space is reserved before it is written, so a full disk is
noticed while everything still is in memory. What outlives a process is `cache.save`'s to write.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..core.errors import TierError
from .arena import words
from .residents import Residents

ALIGNMENT = 4096  # of a record in the file: no read touches a block of the disk more than it must
GROWTH = 1.25  # of the file, and of host memory before it


def scratch_file(folder: str | Path) -> BinaryIO:
    """A file without a name in a folder. None is made: it would stay behind, and a wrong name would fill a wrong disk.

    Raises:
        TierError: no such folder, or none that can be written.
    """
    try:
        return tempfile.TemporaryFile(dir=folder, buffering=0)
    except OSError as error:
        raise TierError(
            f"disk={str(folder)!r}: no file can be made there: {error}; give a folder that is there and can be written"
        ) from error


class PageFile:
    """Records in an anonymous file of `folder`, aligned, reserved ahead, written behind by a thread.

    Raises:
        TierError: (whenever it is used) a folder that cannot be written, a full disk, a disk that fails.
    """

    def __init__(self, record: int, folder: str | Path) -> None:
        self.record, self.folder = record, Path(folder)
        self.stride = -(-record // ALIGNMENT) * ALIGNMENT
        self.count = self.reserved = 0
        self._writes: list[Future] = []
        self._pool = ThreadPoolExecutor(1, "lcpatch-spill")
        self._file = scratch_file(self.folder)

    def append(self, records: Tensor) -> int:
        """Store records [n, bytes] behind the others; returns the number of the first. They are written later, but have
        their place now."""
        first = self.count
        self._reserve(first + len(records))
        self._writes = [f for f in self._writes if not f.done() or f.exception()]
        if len(records):
            self._writes.append(self._pool.submit(self._write, first, records))
        self.count += len(records)
        return first

    def read(self, numbers: Tensor) -> Tensor:
        """The records [n, bytes], in the order of `numbers`."""
        self.flush()
        numbers = numbers.numpy()
        out = np.empty((len(numbers), self.stride), np.uint8)
        order = np.argsort(numbers, kind="stable")
        runs = np.split(order, np.nonzero(np.diff(numbers[order]) != 1)[0] + 1) if len(order) else []
        for run in runs:  # neighbours in the file come in one read
            wanted = len(run) * self.stride
            try:
                data = os.pread(self._file.fileno(), wanted, int(numbers[run[0]]) * self.stride)
            except (OSError, ValueError) as error:
                raise TierError(f"disk={str(self.folder)!r}: pages cannot be read back: {error}") from error
            if len(data) != wanted:
                raise TierError(f"disk={str(self.folder)!r}: {len(data)} bytes came back where {wanted} were written")
            out[run] = np.frombuffer(data, np.uint8).reshape(len(run), self.stride)
        return torch.from_numpy(out[:, : self.record].copy())

    def flush(self) -> None:
        """Wait until all is written; what failed once is said whenever it is asked for."""
        for write in self._writes:
            try:
                write.result()
            except (OSError, ValueError) as error:
                raise TierError(
                    f"disk={str(self.folder)!r}: pages could not be written: {error}; cache.reset() and prefill again"
                ) from error
        self._writes = []

    @property
    def nbytes(self) -> int:
        return self.reserved * self.stride

    def _write(self, start: int, records: Tensor) -> None:
        data = np.zeros((len(records), self.stride), np.uint8)
        data[:, : self.record] = records.numpy()
        view, offset = memoryview(data).cast("B"), start * self.stride
        while view:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def _reserve(self, count: int) -> None:
        if count <= self.reserved:
            return
        reserved = max(count, int(self.reserved * GROWTH))
        begin, size = self.reserved * self.stride, (reserved - self.reserved) * self.stride
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), begin, size)
            else:
                self._file.truncate(begin + size)
        except (OSError, ValueError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            why = f"it is full: {size} bytes more are wanted, {free} are free" if full else str(error)
            raise TierError(
                f"disk={str(self.folder)!r}: {why}; nothing that was written is lost. Make room, or give another "
                "folder or a smaller codec, then cache.reset() and prefill again"
            ) from error
        self.reserved = reserved


class Disk:
    """Every record in a file, and those used last in host memory too.

    Args:
        record: bytes, in whole words of 8.
        folder: of the file.
        room: how many records host memory may hold; it is reserved as they come.
        pinned: whether what is read goes to a GPU.
    """

    def __init__(self, record: int, folder: str | Path, room: int, pinned: bool) -> None:
        self.record, self.room, self.pinned = record, room, pinned
        self.file = PageFile(record, folder)
        self.host = torch.empty(0, record, dtype=torch.uint8)
        self.resident = Residents(1, 0)
        self.from_host = self.from_disk = 0  # records read
        self._lock = Lock()  # a thread reads ahead

    def append(self, records: Tensor) -> int:
        """Store records [n, bytes] behind the others; returns the number of the first."""
        records = records.cpu()
        with self._lock:
            first = self.file.append(records)
            self._admit(torch.arange(first, first + len(records)), records)
            return first

    def read(self, numbers: Tensor) -> Tensor:
        """The records [n, bytes] of these numbers [n], which may repeat, on the host."""
        wanted, back = numbers.unique(return_inverse=True)
        out = torch.empty(len(wanted), self.record, dtype=torch.uint8)
        with self._lock:
            self.resident.reserve(self.file.count)
            slots = self.resident.find(wanted[None])[0]
            here, away = (slots >= 0).nonzero().squeeze(1), (slots < 0).nonzero().squeeze(1)
            if len(here):
                words(out)[here] = words(self.host)[slots[here]]
            if len(away):
                found = self.file.read(wanted[away])
                words(out)[away] = words(found)
                self._admit(wanted[away], found)
            self.from_host, self.from_disk = self.from_host + len(here), self.from_disk + len(away)
        found = torch.empty(len(numbers), self.record, dtype=torch.uint8, pin_memory=self.pinned)
        torch.index_select(words(out), 0, back, out=words(found))
        return found

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        return {"host": self.host.nbytes, "disk": self.file.nbytes}

    def _admit(self, numbers: Tensor, records: Tensor) -> None:
        if room := self.room:
            numbers, records = numbers[-room:], records[-room:]
            self._widen()
            self.resident.reserve(self.file.count)
            slots = self.resident.take(numbers[None, None])[0].flatten().long()
            words(self.host)[slots] = words(records)

    def _widen(self) -> None:
        """Have slots for every record that there is, as far as host memory may hold them."""
        held, wanted = len(self.host), min(self.file.count, self.room)
        if wanted > held:
            slots = min(self.room, max(wanted, int(held * GROWTH)))
            self.host, old = torch.empty(slots, self.record, dtype=torch.uint8), self.host
            self.host[:held] = old
            self.resident.grow(slots, torch.tensor([slots]))
