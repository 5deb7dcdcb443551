"""Pages whose home is elsewhere: on the device only as many as fit, in host memory or a file every full one.

A page is written to its home when it is full, in what the codec makes of it; the device keeps those used last as they
came. So a page loses precision only when it has left the device and comes back, and leaving it costs nothing.

What is where is known on the device, and a GPU reads host memory by itself, so with all of it there a token waits for
nothing. What a disk is asked for must be known on the host.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ahead import Ahead
from .codec import Plain
from .fast_tier import FastTier
from .home import Home
from .pages import Filled, spare
from .records import Record
from .rows import alike, as_index
from .untrusted import whole, wholes

RESTORED = ("keys", "values", "page_in", "used", "records")
TRAFFIC = ("wanted", "missed", "fetched_ahead", "from_host", "from_disk", "fetched_bytes")


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
        self.limits: list[int] = []  # of each row: full pages that it may have on the device
        self.fast: FastTier | None = None
        self.home: Home | None = None
        self.counts: Tensor | None = None  # [2]: pages asked for; of these, those that were not on the device
        self.ahead: Tensor | None = None  # the same of what was fetched ahead
        self._coming: Ahead | None = None
        self._open: tuple[list[int], Tensor] | None = None
        self._full: list[int] = []  # rows whose open page is full

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredPages:
        """A copy with a fast tier of its own; home, where nothing ever changes, is shared."""
        self._land()
        new = copy.copy(self)
        memo[id(self)] = new
        new.lengths, new.limits, new._full = list(self.lengths), list(self.limits), []
        if self.fast is not None:
            for name in ("fast", "home", "counts", "ahead"):
                setattr(new, name, copy.deepcopy(getattr(self, name)))
            new._coming = Ahead(self.counts.device)
        return new

    @property
    def lossless(self) -> bool:
        """Whether every page comes back as it left."""
        return self.codec.lossless

    @property
    def keys(self) -> Tensor:
        """[B, K, (slots + 1) page, D]"""
        return self.fast.data[:, :, 0]

    @property
    def values(self) -> Tensor:
        """[B, K, (slots + 1) page, D]"""
        return self.fast.data[:, :, 1]

    @property
    def room(self) -> int:
        """Pages that are reserved."""
        return self.home.room

    @property
    def num_heads(self) -> int:
        return self.fast.data.shape[1]

    def allow(self, pages: list[int]) -> None:
        """So many full pages of each row may be on the device, from now on; never fewer than before."""
        limits = [max(old, new) for old, new in zip(self.limits or pages, pages, strict=True)]
        if self.fast is not None and limits != self.limits:
            self._land()
            self.fast.widen(max(self.lengths) // self.page, limits)
        self.limits = limits

    def append(self, keys: Tensor, values: Tensor, skip: list[int]) -> Iterator[Filled]:
        """Store new tokens [B, K, T, D], of each row but the first `skip[row]`; yields as `Pages.append` does."""
        if self.fast is None:
            self._begin(keys)
        self._land()
        for rows in alike(zip(self.lengths, self.limits, skip, strict=True)):
            which, first = self._index(rows), skip[rows[0]]
            yield from self._append(rows, torch.stack([x[which, :, first:] for x in (keys, values)], 2))

    def close(self) -> Iterator[Filled]:
        """Send pages home that single tokens have filled, once those have attended; yields as `append` does."""
        full, self._full = self._full, []
        for some in alike([(self.lengths[row], self.limits[row]) for row in full]):
            rows = [full[n] for n in some]
            end = self.lengths[rows[0]] // self.page
            pages = self.fast.open_pages(self._index(rows))
            self._settle(rows, end - 1, pages[:, :, None])
            yield rows, end - 1, pages[:, :, 0]

    def stand_still(self, pages: int) -> None:
        """Have room for so many pages and more, and the slots that those may have: nothing moves while they fit."""
        self._land()
        if pages > self.room:
            self.home.reserve(pages + spare(pages))
        self.fast.widen(self.room, self.limits)

    def put(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        """Write a token [B, K, 1, D] of every row, of `length` [B] with it, to the open page; counts nothing."""
        data, row = self.fast.data, torch.arange(len(length), device=length.device)
        place = data.shape[3] - self.page + (length - 1) % self.page
        # By index: what else could be said so (a slice, `scatter_`), inductor does to a copy of the whole buffer.
        data[row, :, :, place] = torch.stack([keys, values], 2)[:, :, :, 0]

    def filled(self, tokens: int) -> None:
        """Count what `put` has written to every row; `close` then sends home what is full."""
        self.lengths = [n + tokens for n in self.lengths]
        self._full = [row for row, n in enumerate(self.lengths) if n % self.page == 0]

    def fetch(self, pages: Tensor, newest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(keys, values, slots)`: brings the pages [B, K, M] (-1: none) to the device and says where they are; each
        row's `newest` [B, 1, 1] is open."""
        self._land()
        return self.keys, self.values, self.bring(pages, newest)

    def bring(self, pages: Tensor, newest: Tensor) -> Tensor:
        """The same where nothing is fetched ahead: the slots."""
        return self._bring(pages, newest, self.counts)

    def prefetch(self, pages: Tensor) -> None:
        """Begin to fetch the pages [B, K, M], which may be asked for soon."""
        if self.fast is None or self._coming.under_way:
            return
        slots, fresh = self.fast.residents.take(pages, self._open_page(), self.ahead)
        if self.home.direct:
            self._coming.on_stream(partial(self.home.bring, fresh, slots, self.fast.data))
            return
        group, slot, numbers = self.home.listed(fresh, slots)
        if len(numbers):
            self._coming.on_thread(
                partial(self.home.fetch, numbers),
                lambda records: self.fast.put(group, slot, self.home.record.unpack(records)),
            )

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, K, tokens, D] on the device, for as long as the caller holds them."""
        self._land()
        most, full = max(self.lengths), max(self.lengths) // self.page
        shape = self.fast.data.shape
        out = self.fast.data.new_zeros(*shape[:3], (full + 1) * self.page, shape[4])
        away = (self.home.table[:, :, :full] >= 0) & ~self.fast.copy_to(out, full)
        if self.home.direct:
            self.home.store.from_host += int(away.sum())
        place = torch.arange(full, device=out.device).expand_as(away)
        self.home.bring(place.masked_fill(~away, -1), place.int(), out)
        for rows in alike(self.lengths):
            which, end = self._index(rows), self.lengths[rows[0]]
            rest = end % self.page
            out[which, :, :, end - rest : end] = self.fast.open_pages(which)[:, :, :, :rest]
        return out[:, :, 0, :most], out[:, :, 1, :most]

    def look(self) -> tuple[Tensor, Tensor]:
        """The same for who only measures: what is read counts nowhere."""
        store = self.home.store
        counts = store.from_host, store.from_disk
        found = self.whole()
        store.from_host, store.from_disk = counts
        return found

    def cut(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its new length on; a full page that is cut is open again."""
        if self.fast is None:
            return
        self._land()
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            first = new // self.page
            if first == old // self.page:
                continue
            if new % self.page:
                page = torch.full((len(lengths), self.num_heads, 1), -1, device=self.counts.device)
                page[row] = first
                self.fast.reopen(row, self._bring(page)[row, :, 0])
            self.fast.cut(row, first)
            self.home.cut(row, first)
        self.lengths = list(lengths)

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows; those that share a past share its pages at home."""
        self.lengths = [self.lengths[r] for r in rows]
        self.limits = [self.limits[r] for r in rows] if self.limits else []
        if self.fast is None:
            return
        self._land()
        self.fast.select_rows(rows)
        self.home.select_rows(rows)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load` takes, or, where a page that comes back is not what it was, `restore`."""
        if self.lossless:
            return dict(zip(("keys", "values"), self.whole(), strict=True)), {}
        self._land()
        tensors, clock = self.fast.state()
        tensors["records"] = self.home.state(max(self.lengths) // self.page)
        return tensors, {"limits": self.limits, "clock": clock}

    def load(self, keys: Tensor, values: Tensor, lengths: list[int], numbers: dict[str, Any]) -> None:
        """Hold the tokens [B, K, T, D] of rows that are filled from the left."""
        self._begin(keys)
        self.lengths = [0] * len(lengths)
        for rows in alike(zip(lengths, self.limits, strict=True)):
            which, end = self._index(rows), lengths[rows[0]]
            for _ in self._append(rows, torch.stack([x[which, :, :end] for x in (keys, values)], 2)):
                pass

    def restore(self, tensors: dict[str, Tensor], lengths: list[int], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of a store with such a codec gave: pages as they lay, the same ones on the device.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        if tensors.keys() != set(RESTORED):
            raise ValueError(f"tensors {sorted(tensors)} where {sorted(RESTORED)} are wanted")
        full = [n // self.page for n in lengths]
        self._begin(like.expand(len(lengths), -1, -1, -1))
        self.lengths, self.limits = lengths, wholes(numbers, "limits", len(lengths))
        self.home.restore(tensors["records"], full)
        self.fast.restore(tensors, whole(numbers, "clock"), self.limits, full)

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        if self.fast is None:
            return {"device": 0}
        held = (*self.tensors, self.home.table, self.ahead)
        return {"device": sum(x.untyped_storage().nbytes() for x in held), **self.home.store.nbytes()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a token reads and writes."""
        return *self.fast.tensors, self.home.address, self.counts

    def traffic(self) -> dict[str, int]:
        """What was asked for, what was not on the device, and what was read from where; waits for the device."""
        if self.fast is None:
            return dict.fromkeys(TRAFFIC, 0)
        (wanted, missed), ahead, store = self.counts.tolist(), int(self.ahead[1]), self.home.store
        host, disk = store.from_host + (missed + ahead if self.home.direct else 0), store.from_disk
        found = (wanted, missed, ahead, host, disk, (host + disk) * self.home.record.nbytes)
        return dict(zip(TRAFFIC, found, strict=True))

    def _begin(self, keys: Tensor) -> None:
        rows, heads, _, head_dim = keys.shape
        record = Record(self.codec, self.page, keys.new_empty(1, heads, 0, head_dim))
        self.fast = FastTier(self.page, keys)
        self.home = Home(record, rows, heads, keys.device, self.folder, self.host_bytes)
        self.counts, self.ahead = (torch.zeros(2, dtype=torch.int64, device=keys.device) for _ in range(2))
        self._coming = Ahead(keys.device)

    def _append(self, rows: list[int], new: Tensor) -> Iterator[Filled]:
        """Store the tokens [rows, K, 2, T, D] of rows that are alike."""
        page, length, which = self.page, self.lengths[rows[0]], self._index(rows)
        rest, begin, single = length % page, length // page, new.shape[3] == 1
        length += new.shape[3]
        end, keys = length // page, None
        if end > begin and single:
            self._full += rows
        elif end > begin:
            new = torch.cat([self.fast.open_pages(which)[:, :, :, :rest], new], 3)
            full = new[:, :, :, : (end - begin) * page].unflatten(3, (-1, page))
            self._settle(rows, begin, full.transpose(2, 3))
            keys, new, rest = full[:, :, 0].flatten(2, 3), new[:, :, :, (end - begin) * page :], 0
        start = self.fast.slots * page + rest
        self.fast.data[which, :, :, start : start + new.shape[3]] = new
        for row in rows:
            self.lengths[row] = length
        if keys is not None:
            yield rows, begin, keys

    def _settle(self, rows: list[int], begin: int, full: Tensor) -> None:
        """Send full pages [rows, K, n, 2, page, D] home, and keep the last of them on the device."""
        which, end = self._index(rows), begin + full.shape[2]
        self.home.put(which, begin, self.home.record.pack(full.flatten(0, 2)).unflatten(0, full.shape[:3]))
        self.fast.widen(end, self.limits)
        self.fast.keep(which, end, full[:, :, max(0, full.shape[2] - self.limits[rows[0]]) :])

    def _open_page(self) -> Tensor:
        """Each row's open page [B, 1, 1]; -2 where none has begun."""
        state = [n // self.page if n % self.page else -2 for n in self.lengths]
        if self._open is None or self._open[0] != state:
            self._open = state, torch.tensor(state).to(self.counts.device)[:, None, None]
        return self._open[1]

    def _bring(self, pages: Tensor, newest: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """The slots [B, K, M] of pages (-1: none), which then are on the device."""
        slots, fresh = self.fast.residents.take(pages, newest, counts)
        self.home.bring(fresh, slots, self.fast.data)
        return slots

    def _land(self) -> None:
        if self._coming is not None:
            self._coming.land()

    def _index(self, rows: list[int]) -> Tensor | slice:
        return as_index(rows, len(self.lengths), self.fast.data.device)


def traffic(stores: list[TieredPages]) -> dict[str, Any]:
    """What `stats` says of pages that lie elsewhere: see `TieredCache.stats`."""
    total = Counter()
    for store in stores:
        total.update(store.traffic())
    wanted, missed = total.pop("wanted", 0), total.pop("missed", 0)
    return {"hit_rate": 1 - missed / wanted if wanted else 1.0, **total}
