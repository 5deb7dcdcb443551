"""Records of equal size in host memory. Records are only added."""

from __future__ import annotations

from bisect import bisect

import torch
from torch import Tensor

FIRST_BLOCK = 64  # records
LARGEST_BLOCK = 64 << 20  # bytes


class Arena:
    """Records in blocks that double up to 64 MiB: nothing is moved when it grows.

    Page-locked memory is handed out in powers of two, so a block is one, or just below.

    Args:
        record: bytes, in whole words of 8: bytes one by one are copied at a twentieth of the speed.
        pinned: page-locked, so that a GPU reads and writes it by itself.
    """

    from_disk = 0  # records read, as a `Disk` counts them

    def __init__(self, record: int, pinned: bool) -> None:
        self._reader: torch.device | None = None  # a GPU that reads the blocks by itself
        if record % 8:
            raise ValueError(f"record={record} must be a multiple of 8 bytes")
        self.record, self.pinned = record, pinned
        self.blocks: list[Tensor] = []
        self.starts: list[int] = [0]  # and the end of the last block
        self.count = 0
        self.from_host = 0  # records that the host read; a GPU counts its own

    def __del__(self) -> None:
        """A kernel may still read the blocks, which their allocator does not know: it would give them to others."""
        if self._reader is not None:
            torch.cuda.synchronize(self._reader)

    def append(self, records: Tensor) -> int:
        """Store records [n, bytes] behind the others; returns the number of the first.

        From a GPU they come when its stream is there, and so does what reads them on that stream.
        """
        first, done = self.count, 0
        self._reserve(first + len(records))
        self.count += len(records)
        while done < len(records):
            block = bisect(self.starts, first + done) - 1
            begin = first + done - self.starts[block]
            some = min(len(records) - done, len(self.blocks[block]) - begin)
            self.blocks[block][begin : begin + some].copy_(records[done : done + some], non_blocking=True)
            done += some
        return first

    def read(self, numbers: Tensor) -> Tensor:
        """The records [n, bytes] of these numbers [n], on the host; wait before for the GPU that they came from."""
        out, block = torch.empty(len(numbers), self.record, dtype=torch.uint8), self._block_of(numbers)
        for n in block.unique().tolist():
            here = (block == n).nonzero().squeeze(1)
            words(out)[here] = words(self.blocks[n])[numbers[here] - self.starts[n]]
        self.from_host += len(numbers)
        return out

    def addresses(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Where in memory the records of these numbers [n], on the host, lie: for `device`, which reads them there."""
        self._reader = device if device.type == "cuda" else None
        block = self._block_of(numbers)
        begin = torch.tensor([x.data_ptr() for x in self.blocks])
        return (begin[block] + (numbers - torch.tensor(self.starts)[block]) * self.record).to(device)

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        return {"host": self.starts[-1] * self.record}

    def _block_of(self, numbers: Tensor) -> Tensor:
        return torch.bucketize(numbers, torch.tensor(self.starts), right=True) - 1

    def _reserve(self, count: int) -> None:
        while self.starts[-1] < count:
            size = FIRST_BLOCK
            if self.blocks:
                power = (FIRST_BLOCK * self.record).bit_length() + len(self.blocks) - 1
                size = max(min(1 << power, LARGEST_BLOCK) // self.record, 1)
            self.blocks.append(torch.empty(size, self.record, dtype=torch.uint8, pin_memory=self.pinned))
            self.starts.append(self.starts[-1] + size)


def words(records: Tensor) -> Tensor:
    """Bytes one by one are copied at a twentieth of the speed."""
    return records.view(torch.int64)
