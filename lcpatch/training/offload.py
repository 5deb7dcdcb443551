"""Keys, values and gradients of a chunked sequence in host memory; the device holds those of a few KV heads at a time.

A page is one chunk's share of a unit, a quarter of a layer's KV heads. A unit that is needed is copied into one of two
slots on the device while the one before computes. Gradients are fetched, added to and put back page by page, on a
stream of their own. So the device's memory grows with the length by two slots and by the gradients that attention
returns for two units: with U units a model, 4 / U of what a KV cache holds, 1/32 for 32 layers.

On a CPU the same code runs with plain copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .buffers import DeviceStore, Now, Pair, Unit

SLAB_BYTES = 1 << 28
"""Host memory is taken in pieces of this size. A power of two: torch rounds pinned memory up to the next one."""
ALIGNMENT = 256
PARTS = 4
"""Units of a layer, where the number of its KV heads allows."""


class HostPool:
    """Pinned host memory, kept from call to call: pinning a gigabyte takes about as long as filling it.

    Args:
        pinned: whether to pin; default: where there is CUDA.
        slab_bytes: a power of two.
    """

    def __init__(self, pinned: bool | None = None, slab_bytes: int = SLAB_BYTES) -> None:
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        self.slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._slab, self._used = 0, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, until `rewind`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        while self._slab < len(self._slabs) and self._used + size > len(self._slabs[self._slab]):
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._grow(max(self.slab_bytes, 1 << (size - 1).bit_length()))
        flat = self._slabs[self._slab][self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return flat.view(dtype).view(shape)

    def reserve(self, num_bytes: int) -> None:
        """Take at least so much from the system now, so that no step waits for it."""
        while self.memory() < num_bytes:
            self._grow(self.slab_bytes)

    def rewind(self) -> None:
        """All of it is free again, for the next call."""
        self._slab, self._used = 0, 0

    def release(self) -> None:
        """Give it back to the system."""
        self._slabs.clear()
        self.rewind()

    def memory(self) -> int:
        """Bytes taken from the system."""
        return sum(len(slab) for slab in self._slabs)

    def _grow(self, num_bytes: int) -> None:
        self._slabs.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned))


POOL = HostPool()
"""What `chunkwise.backward(offload=True)` takes its memory from; `POOL.release()` gives it back."""


class Lanes:
    """Two streams beside the one that computes: into the device, and out of it. Nothing at all on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None

    @contextmanager
    def lane(self, number: int, after: Iterable[Any] = (), uses: Iterable[Tensor] = ()) -> Iterator[None]:
        """Work on lane 0 (in) or 1 (out), after all that was computed so far and the events of `after`.

        `uses`: tensors of the computing stream that must live until this is done.
        """
        if self.streams is None:
            yield
            return
        stream = self.streams[number]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield
        for tensor in uses:
            tensor.record_stream(stream)

    def mark(self) -> Any:
        """An event on the stream at hand."""
        return None if self.streams is None else torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        """Computing goes on after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Wait for both."""
        for stream in self.streams or ():
            stream.synchronize()


@dataclass(eq=False)
class Slot:
    """Room on the device for one unit: which one is in it, up to which token, and when it has arrived."""

    tensors: Pair
    unit: Unit
    end: int = 0
    ready: Any = None


@dataclass
class Pages:
    """A unit's pages in host memory, one a chunk, and when they were last written."""

    kept: list[Pair] = field(default_factory=list)
    grads: dict[int, Pair] = field(default_factory=dict)
    kept_at: Any = None
    grads_at: Any = None


class HostStore:
    """A `buffers.Store` in host memory, but for layers that do not attend by themselves: those stay on the device.

    Args:
        length: tokens of the sequence.
        chunk_size: tokens of a page.
        attending: the layers that attend by themselves.
        pool: where pages come from; rewound by `close`.
    """

    def __init__(self, length: int, chunk_size: int, attending: frozenset[int], pool: HostPool) -> None:
        self.length, self.chunk_size, self.attending, self.pool = length, chunk_size, attending, pool
        self._resident = DeviceStore(length)
        self._pages: dict[Unit, Pages] = {}
        self._slots: list[Slot] = []  # the one in use last
        self._lanes: Lanes | None = None
        self._adding: Any = None
        self._follows: dict[tuple[Any, ...], Unit] = {}
        self._before: tuple[Any, ...] | None = None

    def num_units(self, num_kv_heads: int) -> int:
        return next(n for n in range(min(PARTS, num_kv_heads), 0, -1) if num_kv_heads % n == 0)

    def write(self, unit: Unit, new: Pair, start: int) -> None:
        if unit[0] not in self.attending:
            return self._resident.write(unit, new, start)
        if self._lanes is None:
            self._lanes = Lanes(new[0].device)
        pages = self._pages.setdefault(unit, Pages())
        slot = self._load(unit, start, new)
        self._lanes.wait(slot.ready)
        end = start + new[0].shape[2]
        for buffer, part in zip(slot.tensors, new, strict=True):
            buffer[:, :, start:end] = part
        slot.end, slot.ready = end, None
        source = [x.contiguous() for x in new]
        pages.kept.append(self._page(source))
        with self._lanes.lane(1, uses=source):
            _copy(pages.kept[-1], source)
            pages.kept_at = self._lanes.mark()
        return None

    def read(self, unit: Unit, now: Now) -> Pair:
        if unit[0] not in self.attending:
            return self._resident.read(unit, now)
        slot = self._load(unit, now.end, self._pages[unit].kept[0])
        self._lanes.wait(slot.ready)
        slot.ready = None
        self._slots.sort(key=lambda other: other is slot)
        if (soon := self._predict(unit, now)) is not None and soon != unit:
            pages = self._pages[soon]
            held = len(pages.kept) * self.chunk_size
            self._load(soon, min(now.end, held), pages.kept[0])
        keys, values = slot.tensors
        return keys[:, :, : now.end], values[:, :, : now.end]

    def add(self, unit: Unit, grads: Pair, start: int, end: int) -> None:
        if unit[0] not in self.attending:
            return self._resident.add(unit, grads, start, end)
        pages, lanes, size = self._pages[unit], self._lanes, self.chunk_size
        if self._adding is not None:  # else gradients of many units would wait on the device for their turn
            self._adding.synchronize()
        with lanes.lane(1, uses=grads):
            for n in range(start // size, end // size):
                self._add_page(pages, n, [x[:, :, n * size - start : (n + 1) * size - start] for x in grads])
            pages.grads_at = self._adding = lanes.mark()
        return None

    def take(self, unit: Unit, grads: Pair, now: Now) -> Pair:
        if unit[0] not in self.attending:
            return self._resident.take(unit, grads, now)
        pages, lanes = self._pages[unit], self._lanes
        left = pages.grads.pop(now.start // self.chunk_size, None)
        if left is None:
            keys, values = (x.clone() for x in grads)  # not the whole text's gradient kept alive by a view
            return keys, values
        with lanes.lane(0, after=[pages.grads_at]):
            arrived = [x.to(lanes.device, non_blocking=True) for x in left]
            event = lanes.mark()
        lanes.wait(event)
        keys, values = (torch.add(x, y, alpha=now.hop) for x, y in zip(grads, arrived, strict=True))
        for x in arrived if lanes.streams else ():
            x.record_stream(torch.cuda.current_stream(lanes.device))
        return keys, values

    def skip(self, num_chunks: int) -> None:
        for pages in self._pages.values():
            pages.kept.extend(pages.kept[:1] * num_chunks)  # one page for all, so that no host memory is taken
            pages.grads = dict.fromkeys(range(num_chunks + 1), pages.kept[0])

    def memory(self) -> dict[str, int]:
        slots = sum(x.untyped_storage().nbytes() for slot in self._slots for x in slot.tensors)
        return {"device": self._resident.memory()["device"] + slots, "host": self.pool.memory()}

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.synchronize()
        self._resident.close()
        self._pages.clear()
        self._slots.clear()
        self.pool.rewind()

    def _add_page(self, pages: Pages, number: int, parts: list[Tensor]) -> None:
        """Add to a page of gradients, on the lane at hand."""
        if number not in pages.grads:
            pages.grads[number] = self._page(parts)
            _copy(pages.grads[number], [x.contiguous() for x in parts])
            return
        sums = [x.to(parts[0].device, non_blocking=True, copy=True) for x in pages.grads[number]]
        for total, part in zip(sums, parts, strict=True):
            total += part
        _copy(pages.grads[number], sums)

    def _load(self, unit: Unit, end: int, like: Pair) -> Slot:
        """The slot with a unit's tokens up to `end`, under way to it."""
        slot = self._slot(unit, like)
        if slot.end >= end:
            return slot
        pages = self._pages[unit]
        with self._lanes.lane(0, after=[pages.kept_at]):
            for n in range(slot.end // self.chunk_size, -(-end // self.chunk_size)):
                where = slice(n * self.chunk_size, min((n + 1) * self.chunk_size, self.length))
                _copy([x[:, :, where] for x in slot.tensors], pages.kept[n])
            slot.ready = self._lanes.mark()
        slot.end = min(-(-end // self.chunk_size) * self.chunk_size, self.length)
        return slot

    def _slot(self, unit: Unit, like: Pair) -> Slot:
        """A unit's slot; if it has none, that of the unit used longest ago."""
        for slot in self._slots:
            if slot.unit == unit:
                return slot
        if len(self._slots) < 2:
            tensors = tuple(x.new_empty(*x.shape[:2], self.length, x.shape[3], device=self._lanes.device) for x in like)
            self._slots.insert(0, Slot(tensors, unit))
            return self._slots[0]
        slot = self._slots[0]
        if any(x.shape[:2] != y.shape[:2] or x.shape[3] != y.shape[3] for x, y in zip(slot.tensors, like, strict=True)):
            self._lanes.synchronize()  # another layer's heads are of another size
            self._slots.pop(0)
            return self._slot(unit, like)
        slot.unit, slot.end = unit, 0  # what may still be arriving is waited for, or overwritten in its lane
        return slot

    def _predict(self, unit: Unit, now: Now) -> Unit | None:
        """What will be read next: what followed the same two units when they last came in this order."""
        if self._before is not None:
            self._follows[self._before] = unit
        last = None if self._before is None else self._before[-1]
        self._before = (now.backward, last, unit)
        return self._follows.get(self._before)

    def _page(self, like: Iterable[Tensor]) -> Pair:
        keys, values = (self.pool.take(tuple(x.shape), x.dtype) for x in like)
        return keys, values


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
