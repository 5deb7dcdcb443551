"""Where kept keys and values lie: for every (row, KV head) the same number of slots, filled to the right.

A row that has fewer tokens than the longest keeps them in its last slots, so that appending a token is one slice for
all rows, and a row's tokens are one run [length - count, length).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAP = 4096  # slots that a buffer of 8K to 32K grows by; smaller ones grow by a half, larger ones by an eighth
GRAIN = 256  # capacities are multiples of this many tokens


class Slots:
    """Tensors [B, K, capacity, …] by name, of which the first `length` slots are filled.

    Args:
        tensors: alike in the first three dimensions.
        length: filled slots; None: all.
        borrowed: the tensors are someone else's, perhaps views of larger ones: to be copied before they are kept.
    """

    def __init__(self, tensors: dict[str, Tensor], length: int | None = None, borrowed: bool = False) -> None:
        self.tensors = tensors
        self.length = self.capacity if length is None else length
        self.borrowed = borrowed

    @property
    def capacity(self) -> int:
        return next((x.shape[2] for x in self.tensors.values()), 0)

    def __getitem__(self, name: str) -> Tensor:
        """What is filled of `name`, as a view."""
        return self.tensors[name][:, :, : self.length]

    def append(self, new: dict[str, Tensor], capacity: int) -> None:
        """Add slots in place; a buffer that is full moves into one of `capacity` slots."""
        end = self.length + next(iter(new.values())).shape[2]
        if end > self.capacity or self.borrowed:
            self._move(max(capacity, end))
        for name, x in new.items():
            self.tensors[name][:, :, self.length : end] = x
        self.length = end

    def extended(self, new: dict[str, Tensor]) -> Slots:
        """These slots and new ones behind them, for the time of one step: exactly as large as needed."""
        if self.length == 0:
            return Slots(new, borrowed=True)
        return Slots({name: torch.cat([self[name], x], 2) for name, x in new.items()})

    def last(self, num: int) -> Slots:
        """The last `num` of the filled slots, as views."""
        return Slots({name: self[name][:, :, self.length - num :] for name in self.tensors}, num, borrowed=True)

    def take(self, index: Tensor, capacity: int, into: Slots | None = None) -> Slots:
        """The slots `index` [B, K, M] of every (row, KV head), in buffers of `capacity`, or in those of `into`.

        A negative index makes a slot of arbitrary content. The buffers of `into` are taken if they are large enough
        and not larger than wanted.
        """
        index = index.clamp(min=0)
        size = index.shape[2]
        reuse = into is not None and not into.borrowed and size <= into.capacity <= max(capacity, size)
        tensors = {}
        for name, x in self.tensors.items():
            chosen = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]) if x.dim() == 4 else index)
            if reuse:
                into.tensors[name][:, :, :size] = chosen
                tensors[name] = into.tensors[name]
            else:
                tensors[name] = _buffer(chosen, max(capacity, size))
        return Slots(tensors, size)

    def owned(self, capacity: int) -> Slots:
        """A copy in buffers of `capacity`."""
        return Slots({name: _buffer(self[name], max(capacity, self.length)) for name in self.tensors}, self.length)

    def rows(self, index: Tensor) -> Slots:
        """The batch rows `index`."""
        chosen = {name: x.index_select(0, index.to(x.device)) for name, x in self.tensors.items()}
        return Slots(chosen, self.length)

    def nbytes(self) -> int:
        """Bytes of the memory behind the tensors, each storage once."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors.values()}
        return sum(storages.values())

    def _move(self, capacity: int) -> None:
        self.tensors = {name: _buffer(self[name], capacity) for name in self.tensors}
        self.borrowed = False


def enlarged(slots: int) -> int:
    """What a buffer of so many slots grows to, at least, when it is full.

    Growing by an eighth leaves at most an eighth of what is filled unused, and moves a token at most eight times in
    all; growing by a half, a half and two. 128K tokens read in chunks of 8K end in a buffer of 130K and were moved 5.9
    times each; by a half it would be one of 182K, and 2.7 times.
    """
    return slots + min(slots // 2, max(LEAP, slots // 8))


def most_room(filled: int, grain: int = GRAIN) -> int:
    """The most slots that a saved buffer says it had: what any growth leaves, and a grain."""
    return filled + filled // 2 + grain


def grown(needed: int, limit: int | None) -> int:
    """The capacity of a buffer that must hold `needed` slots, and will never need more than `limit`."""
    capacity = -(-enlarged(needed) // GRAIN) * GRAIN
    return capacity if limit is None else max(min(capacity, limit), needed)


def _buffer(x: Tensor, capacity: int) -> Tensor:
    """A buffer of `capacity` slots with x in front."""
    if x.shape[2] == capacity and x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    new = x.new_zeros(*x.shape[:2], capacity, *x.shape[3:])  # zeros: a kernel may read behind the end, and mask it
    new[:, :, : x.shape[2]] = x
    return new
