"""Pages whose home is elsewhere: on the device only as many as fit, in host memory or a file every full one.

A page is written to its home when it is full, in what the codec makes of it; the device keeps those used last as they
came. So a page loses precision only when it has left the device and comes back, and leaving it costs nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .codec import Plain
from .pages import alike
from .residents import Residents
from .spill import Home

BATCH = 256 << 20  # bytes of records that are on their way at a time where everything is wanted


class Record:
    """A page's keys and values as bytes, in one piece.

    Args:
        codec: how they are stored.
        page: tokens.
        like: an empty tensor [1, K, 0, D] as the keys are.
    """

    def __init__(self, codec: Plain, page: int, like: Tensor) -> None:
        self.codec, self.like = codec, like
        example = codec.encode(like.new_zeros(1, 1, page, like.shape[3]))
        self.parts = {name: (x.dtype, x.shape[1:], x.numel() * x.element_size()) for name, x in example.items()}
        self.half = sum(size for _, _, size in self.parts.values())

    @property
    def nbytes(self) -> int:
        return 2 * self.half

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """[n, page, D] twice -> uint8 [n, bytes]."""
        encoded = [self.codec.encode(x[:, None])[name] for x in (keys, values) for name in self.parts]
        return torch.cat([x.contiguous().flatten(1).view(torch.uint8) for x in encoded], 1)

    def unpack(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, in the dtype of the keys."""
        return tuple(self._decoded(records[:, i * self.half : (i + 1) * self.half]) for i in range(2))

    def _decoded(self, records: Tensor) -> Tensor:
        parts, start = {}, 0
        for name, (dtype, shape, size) in self.parts.items():
            # cloned: a view as a wider type must begin at a multiple of it
            piece = records[:, start : start + size].clone(memory_format=torch.contiguous_format)
            parts[name] = piece.view(dtype).view(-1, *shape)
            start += size
        return self.codec.decode(parts, self.like)[:, 0]


class Coming(NamedTuple):
    """Pages that are being fetched ahead: their groups and slots, and what the thread gives."""

    group: np.ndarray
    slot: np.ndarray
    future: Future


class TieredPages:
    """As `Pages`; for every (row, KV head), a group, some pages have slots on the device, and so has the open page.

    Args:
        page: tokens a page.
        codec: how full pages are stored.
        folder: of a file for what host memory does not hold; None: it holds all.
        host_bytes: with a folder, what host memory may hold.
    """

    apart = True

    def __init__(self, page: int, codec: Plain, folder: str | Path | None = None, host_bytes: int = 0) -> None:
        self.page, self.codec, self.folder, self.host_bytes = page, codec, folder, host_bytes
        self.lengths: list[int] = []
        self.slots = 0  # pages on the device, beside the open one
        self.limit = 1
        self.wanted = self.found = self.ahead = 0  # pages asked for; those on the device then; of these, fetched ahead
        self.keys: Tensor | None = None  # [B, K, (slots + 1) page, D]; the last slot is the open page's
        self.values: Tensor | None = None
        self._fresh: Tensor | None = None
        self._coming: list[Coming] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredPages:
        """A copy with a fast tier of its own; home, where nothing ever changes, is shared."""
        if self.keys is not None:
            self._land()
        new = copy.copy(self)
        memo[id(self)] = new
        new.lengths, new._coming = list(self.lengths), []
        if self.keys is not None:
            new.keys, new.values, new.table = self.keys.clone(), self.values.clone(), self.table.copy()
            new.residents = copy.deepcopy(self.residents)
            new._pool = ThreadPoolExecutor(1, "lcpatch-prefetch")
        return new

    @property
    def room(self) -> int:
        """Pages that are reserved."""
        return self.table.shape[2]

    @property
    def num_heads(self) -> int:
        return self.keys.shape[1]

    def allow(self, pages: int) -> None:
        """So many full pages may be on the device."""
        self.limit = max(self.limit, pages)

    def append(self, keys: Tensor, values: Tensor, skip: list[int]) -> Iterator[tuple[list[int], int, int]]:
        """Store new tokens [B, K, T, D], of each row but the first `skip[row]`; yields as `Pages.append` does."""
        if self.keys is None:
            self._begin(keys)
        self._land()
        for rows in alike(zip(self.lengths, skip, strict=True)):
            first = skip[rows[0]]
            yield from self._append(rows, keys[rows, :, first:], values[rows, :, first:])

    def tokens(self, rows: list[int], begin: int, end: int) -> Tensor:
        """Keys of the pages which `append` has just yielded."""
        return self._fresh

    def fetch(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(keys, values, slots)`: brings the pages [B, K, M] (-1: none) to the device and says where they are."""
        self._land()
        wanted, slots, group, place = self._locate(pages)
        missing = slots[group, place] < 0
        self.wanted, self.found = self.wanted + len(group), self.found + int((~missing).sum())
        if missing.any():
            group, page = group[missing], wanted[group, place][missing]
            slot = self.residents.place(group, page)
            self._write(group, slot, *self._read(group, page))
            slots[group, place[missing]] = slot
        return self.keys, self.values, torch.from_numpy(slots).int().view(pages.shape).to(self.keys.device)

    def prefetch(self, pages: Tensor) -> None:
        """Begin to fetch the pages [B, K, M], which may be asked for soon."""
        if self.keys is None or self._coming:
            return
        wanted, slots, group, place = self._locate(pages)
        missing = slots[group, place] < 0
        if missing.any():
            group, page = group[missing], wanted[group, place][missing]
            self.ahead += len(group)
            slot = self.residents.place(group, page)
            ids = self._homes()[group, page]
            self._coming.append(Coming(group, slot, self._pool.submit(self._bring, ids)))

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, K, tokens, D] on the device, for as long as the caller holds them."""
        self._land()
        batch, heads, _, head_dim = self.keys.shape
        full = max(self.lengths) // self.page
        out = tuple(x.new_zeros(batch * heads, full + 1, self.page, head_dim) for x in (self.keys, self.values))
        group, slot = np.nonzero(self.residents.page_in >= 0)
        page = self.residents.page_in[group, slot]
        table = self._homes()[:, :full]
        away = table >= 0
        away[group, page] = False
        for x, hot in zip(out, self._by_group(), strict=True):
            x[_index(group, x), _index(page, x)] = hot[_index(group, x), _index(slot, x)]
            for row, length in enumerate(self.lengths):
                rest = length % self.page
                x.view(batch, heads, -1, self.page, head_dim)[row, :, length // self.page, :rest] = hot.view(
                    batch, heads, -1, self.page, head_dim
                )[row, :, -1, :rest]
        step = max(1, BATCH // self.record.nbytes)
        group, page = np.nonzero(away)
        for start in range(0, len(group), step):
            some = slice(start, start + step)
            for x, new in zip(out, self._read(group[some], page[some]), strict=True):
                x[_index(group[some], x), _index(page[some], x)] = new
        most = max(self.lengths)
        return tuple(x.view(batch, heads, -1, head_dim)[:, :, :most] for x in out)

    def cut(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its new length on; a full page that is cut is open again."""
        if self.keys is None:
            return
        self._land()
        heads = self.num_heads
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            first = new // self.page
            if first == old // self.page:
                continue
            group = np.arange(row * heads, (row + 1) * heads)
            if new % self.page:
                page = np.full(heads, first)
                slot = self.residents.find(group, page)
                if (slot < 0).any():
                    missing = slot < 0
                    slot[missing] = self.residents.place(group[missing], page[missing])
                    self._write(group[missing], slot[missing], *self._read(group[missing], page[missing]))
                for x in self._by_group():
                    x[_index(group, x), -1] = x[_index(group, x), _index(slot, x)]
            for n in group:
                self.residents.forget(n, first)
            self.table[row, :, first:] = -1
        self.lengths = list(lengths)

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows; those that share a past share its pages at home."""
        self.lengths = [self.lengths[r] for r in rows]
        if self.keys is None:
            return
        self._land()
        heads = self.num_heads
        self.residents.select((np.array(rows)[:, None] * heads + np.arange(heads)).flatten())
        self.table = self.table[rows]
        self.keys, self.values = (x[rows] for x in (self.keys, self.values))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All tokens, and what `load` takes beside them."""
        return dict(zip(("keys", "values"), self.whole(), strict=True)), {}

    def load(self, keys: Tensor, values: Tensor, lengths: list[int], numbers: dict[str, Any]) -> None:
        """Hold the tokens [B, K, T, D] of rows that are filled from the left."""
        self._begin(keys)
        self.lengths = [0] * len(lengths)
        for rows in alike(lengths):
            end = lengths[rows[0]]
            for _ in self._append(rows, keys[rows, :, :end], values[rows, :, :end]):
                pass

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        if self.keys is None:
            return {"device": 0}
        return {"device": sum(x.untyped_storage().nbytes() for x in (self.keys, self.values)), **self.home.nbytes()}

    def _begin(self, keys: Tensor) -> None:
        batch, heads, _, head_dim = keys.shape
        self.record = Record(self.codec, self.page, keys.new_empty(1, heads, 0, head_dim))
        host = self.host_bytes // self.record.nbytes
        self.home = Home(self.record.nbytes, host, self.folder, pinned=keys.is_cuda)
        self.residents = Residents(batch * heads, 0)
        self.table = np.full((batch, heads, 0), -1, np.int64)  # where each full page is at home
        self.keys, self.values = (keys.new_zeros(batch, heads, self.page, head_dim) for _ in range(2))
        self._pool = ThreadPoolExecutor(1, "lcpatch-prefetch")
        self._stream = torch.cuda.Stream(keys.device) if keys.is_cuda else None

    def _append(self, rows: list[int], keys: Tensor, values: Tensor) -> Iterator[tuple[list[int], int, int]]:
        page, length = self.page, self.lengths[rows[0]]
        rest, begin, end = length % page, length // page, (length + keys.shape[2]) // page
        hot = [x.unflatten(2, (-1, page)) for x in (self.keys, self.values)]
        both = [torch.cat([x[rows, :, -1, :rest], new], 2) for x, new in zip(hot, (keys, values), strict=True)]
        if end > begin:
            full = [x[:, :, : (end - begin) * page].unflatten(2, (-1, page)) for x in both]
            self._settle(rows, begin, *full)
            self._fresh = full[0].flatten(2, 3)
        left = [x[:, :, (end - begin) * page :] for x in both]
        for x, new in zip((self.keys, self.values), left, strict=True):
            x.unflatten(2, (-1, page))[rows, :, -1, : new.shape[2]] = new
        for row in rows:
            self.lengths[row] = length + keys.shape[2]
        if end > begin:
            yield rows, begin, end
            self._fresh = None

    def _settle(self, rows: list[int], begin: int, keys: Tensor, values: Tensor) -> None:
        """Send full pages [rows, K, n, page, D] home, and keep the last of them on the device."""
        num, heads = keys.shape[2], self.num_heads
        if (missing := begin + num - self.room) > 0:
            more = max(missing, self.room // 2)
            self.table = np.pad(self.table, ((0, 0), (0, 0), (0, more)), constant_values=-1)
        records = self.record.pack(*(x.flatten(0, 2) for x in (keys, values)))
        ids = self.home.append(records.cpu()).reshape(len(rows), heads, num)
        self.table[rows, :, begin : begin + num] = ids
        self._widen(min(self.limit, begin + num))
        kept = min(num, self.slots)
        group = (np.array(rows)[:, None] * heads + np.arange(heads)).flatten().repeat(kept)
        page = np.tile(np.arange(begin + num - kept, begin + num), len(rows) * heads)
        slot = self.residents.place(group, page)
        self._write(group, slot, *(x[:, :, num - kept :].flatten(0, 2) for x in (keys, values)))

    def _widen(self, slots: int) -> None:
        """Have at least this many slots on the device; they grow by a half, up to the limit."""
        if slots <= self.slots:
            return
        slots = min(self.limit, max(slots, self.slots + self.slots // 2))
        more = (slots - self.slots) * self.page
        self.keys, self.values = (
            torch.cat([x[:, :, : -self.page], x.new_zeros(*x.shape[:2], more, x.shape[3]), x[:, :, -self.page :]], 2)
            for x in (self.keys, self.values)
        )
        self.residents.grow(slots)
        self.slots = slots

    def _locate(self, pages: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`(wanted [G, M], slots [G, M], group [n], place [n])`: the slots that are known, -1 for others; and, of the
        pages that need one, row and column in these tables. An open page has its own."""
        wanted = pages.cpu().numpy().reshape(-1, pages.shape[2])
        open_page = np.array([n // self.page if n % self.page else -2 for n in self.lengths]).repeat(self.num_heads)
        is_open = wanted == open_page[:, None]
        group, place = np.nonzero((wanted >= 0) & ~is_open)
        slots = np.where(is_open, self.slots, -1)
        slots[group, place] = self.residents.find(group, wanted[group, place])
        return wanted, slots, group, place

    def _read(self, group: np.ndarray, page: np.ndarray) -> tuple[Tensor, Tensor]:
        records = self.home.read(self._homes()[group, page])
        return self.record.unpack(records.to(self.keys.device, non_blocking=True))

    def _bring(self, ids: np.ndarray) -> tuple[Tensor, Any]:
        """In the thread: the records, on their way to the device on a stream of its own."""
        records = self.home.read(ids)
        if self._stream is None:
            return records, None
        with torch.cuda.stream(self._stream):
            moved = records.to(self.keys.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        moved._host = records  # must live until the copy is done
        return moved, event

    def _land(self) -> None:
        """Put what was fetched ahead where its slots are."""
        coming, self._coming = self._coming, []
        for group, slot, future in coming:
            records, event = future.result()
            if event is not None:
                torch.cuda.current_stream(records.device).wait_event(event)
                records.record_stream(torch.cuda.current_stream(records.device))
            self._write(group, slot, *self.record.unpack(records))
            if event is not None:
                event.synchronize()

    def _write(self, group: np.ndarray, slot: np.ndarray, keys: Tensor, values: Tensor) -> None:
        for x, new in zip(self._by_group(), (keys, values), strict=True):
            x[_index(group, x), _index(slot, x)] = new

    def _homes(self) -> np.ndarray:
        """`table` by group, [G, pages], a view."""
        return self.table.reshape(math.prod(self.table.shape[:2]), self.room)

    def _by_group(self) -> tuple[Tensor, Tensor]:
        """The device's pages as [G, slots + 1, page, D], views."""
        return tuple(x.view(math.prod(x.shape[:2]), -1, self.page, x.shape[3]) for x in (self.keys, self.values))


def traffic(stores: list[TieredPages]) -> dict[str, Any]:
    """What `stats` says of pages that lie elsewhere: see `TieredCache.stats`."""
    wanted, homes = sum(x.wanted for x in stores), [x.home for x in stores if x.keys is not None]
    return {
        "hit_rate": sum(x.found for x in stores) / wanted if wanted else 1.0,
        "fetched_ahead": sum(x.ahead for x in stores),
        "from_host": sum(x.from_host for x in homes),
        "from_disk": sum(x.from_disk for x in homes),
    }


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device)
