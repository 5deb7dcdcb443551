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
from bisect import bisect
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from lcpatch_kernels import block_table, gather_records

from ..core.errors import TierError
from .residents import Residents

ALIGNMENT = 4096  # of a record in the file: no read touches a block of the disk more than it must
FILE_GROWTH = 1.25
FIRST_BLOCK = 64  # records
LARGEST_BLOCK = 64 << 20  # bytes


class Arena:
    """Records in host memory, in blocks that double up to 64 MiB: nothing is moved when it grows.

    Page-locked memory is handed out in powers of two, so a block is one, or just below.

    Args:
        record: bytes, in whole words of 8: bytes one by one are copied at a twentieth of the speed.
        pinned: page-locked, so that a GPU reads and writes it by itself.
        room: records of the first block; with more, it grows.
    """

    def __init__(self, record: int, pinned: bool, room: int = FIRST_BLOCK) -> None:
        self._reader: torch.device | None = None  # a GPU that reads the blocks by itself
        if record % 8:
            raise ValueError(f"record={record} must be a multiple of 8 bytes")
        self.record, self.pinned, self.first = record, pinned, room
        self.blocks: list[Tensor] = []
        self.starts: list[int] = [0]  # and the end of the last block
        self.count = 0
        self._table: Tensor | None = None

    def __del__(self) -> None:
        """A kernel may still read the blocks, which their allocator does not know: it would give them to others."""
        if self._reader is not None:
            torch.cuda.synchronize(self._reader)

    def append(self, records: Tensor) -> int:
        """Store records [n, bytes] behind the others; returns the number of the first.

        From a GPU they come when its stream is there, and so does what reads them on that stream.
        """
        first, done = self.count, 0
        self.reserve(first + len(records))
        self.count += len(records)
        while done < len(records):
            block = bisect(self.starts, first + done) - 1
            begin = first + done - self.starts[block]
            some = min(len(records) - done, len(self.blocks[block]) - begin)
            self.blocks[block][begin : begin + some].copy_(records[done : done + some], non_blocking=True)
            done += some
        return first

    def reserve(self, count: int) -> None:
        while self.starts[-1] < count:
            size = self.first
            if self.blocks:
                power = (self.first * self.record).bit_length() + len(self.blocks) - 1
                size = max(min(1 << power, LARGEST_BLOCK) // self.record, 1)
            self.blocks.append(torch.empty(size, self.record, dtype=torch.uint8, pin_memory=self.pinned))
            self.starts.append(self.starts[-1] + size)
            self._table = None

    def read(self, numbers: Tensor) -> Tensor:
        """The records [n, bytes] of these numbers [n], on their device: a GPU reads them itself, and nothing waits."""
        if not len(numbers):
            return torch.empty(0, self.record, dtype=torch.uint8, device=numbers.device)
        if self._table is None or self._table.device != numbers.device:
            self._table = block_table(self.blocks, numbers.device)
        self._reader = numbers.device if numbers.is_cuda else None
        return gather_records(self.blocks, self._table, numbers)

    def addresses(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Where in memory the records of these numbers [n], on the host, lie: for `device`, which reads them there."""
        self._reader = device if device.type == "cuda" else None
        starts = torch.tensor(self.starts[:-1])
        block = torch.bucketize(numbers, starts, right=True) - 1
        begin = torch.tensor([x.data_ptr() for x in self.blocks])
        return (begin[block] + (numbers - starts[block]) * self.record).to(device)

    def write(self, numbers: Tensor, records: Tensor) -> None:
        """Put records in the place of others, where there is but one block."""
        if len(numbers):
            _words(self.blocks[0])[numbers] = _words(records)

    @property
    def nbytes(self) -> int:
        return self.starts[-1] * self.record


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
        self.resident = None if folder is None else Residents(1, 0)
        self.from_host = self.from_disk = 0  # records read
        self._lock = Lock()  # a thread reads ahead
        if folder is not None:
            self.arena.reserve(host_records)
            self.resident.grow(host_records, torch.tensor([host_records]))

    def append(self, records: Tensor) -> int:
        """Store records [n, bytes] behind the others; returns the number of the first."""
        if self.file is None:
            return self.arena.append(records)
        records = records.cpu()
        with self._lock:
            first = self.file.append(records)
            self._admit(torch.arange(first, first + len(records)), records)
            return first

    def read(self, numbers: Tensor) -> Tensor:
        """The records [n, bytes] of these numbers [n], which may repeat, on their device."""
        if self.file is None:
            self.from_host += len(numbers)
            return self.arena.read(numbers)
        wanted, back = numbers.cpu().unique(return_inverse=True)
        out = torch.empty(len(wanted), self.arena.record, dtype=torch.uint8)
        with self._lock:
            self.resident.reserve(self.file.count)
            slots = self.resident.find(wanted[None])[0]
            here, away = (slots >= 0).nonzero().squeeze(1), (slots < 0).nonzero().squeeze(1)
            if len(here):
                _words(out)[here] = _words(self.arena.read(slots[here]))
            if len(away):
                found = self.file.read(wanted[away])
                _words(out)[away] = _words(found)
                self._admit(wanted[away], found)
            self.from_host, self.from_disk = self.from_host + len(here), self.from_disk + len(away)
        found = torch.empty(len(numbers), self.arena.record, dtype=torch.uint8, pin_memory=self.arena.pinned)
        torch.index_select(_words(out), 0, back, out=_words(found))
        return found.to(numbers.device, non_blocking=True)

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        return {"host": self.arena.nbytes} | ({} if self.file is None else {"disk": self.file.nbytes})

    def _admit(self, numbers: Tensor, records: Tensor) -> None:
        if room := self.resident.num_slots:
            numbers, records = numbers[-room:], records[-room:]
            self.resident.reserve(self.file.count)
            self.arena.write(self.resident.take(numbers[None, None])[0].flatten().long(), records)


def _words(records: Tensor) -> Tensor:
    """Bytes one by one are copied at a twentieth of the speed."""
    return records.view(torch.int64)
