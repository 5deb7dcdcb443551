"""Where records of equal size lie outside of the device: host memory, and a file behind it. Records are only added.

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

import numpy as np
import torch
from torch import Tensor

from ..core.errors import TierError
from .residents import Residents

ALIGNMENT = 4096  # of a record in the file: no read touches a block of the disk more than it must
FILE_GROWTH = 1.25
FIRST_BLOCK = 64  # records


class Arena:
    """Records in host memory, in blocks, each a quarter of what there is: nothing is moved when it grows.

    Args:
        record: bytes.
        pinned: page-locked, so that copies to a GPU need no staging.
        room: records of the first block; with more, it grows.
    """

    def __init__(self, record: int, pinned: bool, room: int = FIRST_BLOCK) -> None:
        self.record, self.pinned, self.first = record, pinned, room
        self.blocks: list[Tensor] = []
        self.starts: list[int] = [0]  # and the end of the last block
        self.count = 0

    def append(self, records: Tensor) -> np.ndarray:
        """Store records [n, bytes]; returns their numbers."""
        numbers = np.arange(self.count, self.count + len(records))
        self.reserve(self.count + len(records))
        self.count += len(records)
        self.write(numbers, records)
        return numbers

    def reserve(self, count: int) -> None:
        while self.starts[-1] < count:
            size = max(self.starts[-1] // 4, FIRST_BLOCK) if self.blocks else self.first
            self.blocks.append(torch.empty(size, self.record, dtype=torch.uint8, pin_memory=self.pinned))
            self.starts.append(self.starts[-1] + size)

    def write(self, numbers: np.ndarray, records: Tensor) -> None:
        for block, inside, here in self._by_block(numbers):
            block[inside] = records[here]

    def read(self, numbers: np.ndarray) -> Tensor:
        out = torch.empty(len(numbers), self.record, dtype=torch.uint8, pin_memory=self.pinned)
        for block, inside, here in self._by_block(numbers):
            out[here] = block[inside]
        return out

    @property
    def nbytes(self) -> int:
        return self.starts[-1] * self.record

    def _by_block(self, numbers: np.ndarray):
        which = np.searchsorted(self.starts, numbers, side="right") - 1
        for index in np.unique(which):
            here = np.nonzero(which == index)[0]
            yield self.blocks[index], torch.from_numpy(numbers[here] - self.starts[index]), torch.from_numpy(here)


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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 (as long as this lives)
        except OSError as error:
            raise TierError(f"disk={str(folder)!r}: no file can be made there: {error}") from error

    def append(self, records: Tensor) -> np.ndarray:
        """Store records [n, bytes]; returns their numbers. They are written later, but have their place now."""
        numbers = np.arange(self.count, self.count + len(records))
        self._reserve(self.count + len(records))
        self._writes = [f for f in self._writes if not f.done() or f.exception()]
        if len(records):
            self._writes.append(self._pool.submit(self._write, self.count, records))
        self.count += len(records)
        return numbers

    def read(self, numbers: np.ndarray) -> Tensor:
        """The records [n, bytes], in the order of `numbers`."""
        self.flush()
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
        return torch.from_numpy(out[:, : self.record])

    def flush(self) -> None:
        """Wait until all is written."""
        writes, self._writes = self._writes, []
        for write in writes:
            try:
                write.result()
            except (OSError, ValueError) as error:
                raise TierError(
                    f"disk={str(self.folder)!r}: pages could not be written: {error}; cache.reset() and prefill again"
                ) from error

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
        reserved = max(count, int(self.reserved * FILE_GROWTH))
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


class Home:
    """Every full page, in host memory; with a folder, in a file, and the pages used last in host memory too.

    Args:
        record: bytes of a page.
        host_records: with a folder, how many records host memory may hold.
        folder: of the file, or None.
        pinned: see `Arena`.
    """

    def __init__(self, record: int, host_records: int, folder: str | Path | None, pinned: bool) -> None:
        self.arena = Arena(record, pinned, FIRST_BLOCK if folder is None else host_records)
        self.file = None if folder is None else PageFile(record, folder)
        self.resident = None if folder is None else Residents(1, host_records)
        self.from_host = self.from_disk = 0  # records read
        self._lock = Lock()  # a thread reads ahead
        if folder is not None:
            self.arena.reserve(host_records)

    def append(self, records: Tensor) -> np.ndarray:
        """Store records [n, bytes]; returns their numbers."""
        with self._lock:
            if self.file is None:
                return self.arena.append(records)
            numbers = self.file.append(records)
            self._admit(numbers, records)
            return numbers

    def read(self, numbers: np.ndarray) -> Tensor:
        """The records [n, bytes] of these numbers, which may repeat."""
        with self._lock:
            if self.file is None:
                self.from_host += len(numbers)
                return self.arena.read(numbers)
            numbers, back = np.unique(numbers, return_inverse=True)
            out = torch.empty(len(numbers), self.arena.record, dtype=torch.uint8, pin_memory=self.arena.pinned)
            slots = self.resident.find(np.zeros_like(numbers), numbers)
            here, away = np.nonzero(slots >= 0)[0], np.nonzero(slots < 0)[0]
            out[torch.from_numpy(here)] = self.arena.read(slots[here])
            if len(away):
                found = self.file.read(numbers[away])
                out[torch.from_numpy(away)] = found
                self._admit(numbers[away], found)
            self.from_host, self.from_disk = self.from_host + len(here), self.from_disk + len(away)
            return out[torch.from_numpy(back)]

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        return {"host": self.arena.nbytes} | ({} if self.file is None else {"disk": self.file.nbytes})

    def _admit(self, numbers: np.ndarray, records: Tensor) -> None:
        room = self.resident.num_slots
        if room:
            numbers, records = numbers[-room:], records[-room:]
            self.arena.write(self.resident.place(np.zeros_like(numbers), numbers), records)
