"""Pages whose home is elsewhere: on the device only as many as fit, in host memory or a file every full one.

A page is written to its home when it is full, in what the codec makes of it; the device keeps those used last as they
came. So a page loses precision only when it has left the device and comes back, and leaving it costs nothing.

What is where is known on the device, and a GPU reads host memory by itself, so with all of it there a token waits for
nothing. What a disk is asked for must be known on the host.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import bring_pages

from .arena import Arena
from .codec import Plain
from .pages import alike, spare
from .records import Record
from .residents import GRAIN, NEVER, Residents, rearranged
from .spill import Disk
from .state import fitting, whole, wholes

TRAFFIC = ("wanted", "missed", "fetched_ahead", "from_host", "from_disk", "fetched_bytes")
BATCH = 64 << 20  # bytes of records of a disk that are on their way at a time


class Coming(NamedTuple):
    """Pages of a disk that are being fetched ahead: their groups and slots, and what comes of it."""

    group: Tensor
    slot: Tensor
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
        self.limits: list[int] = []  # of each row: full pages that it may have on the device
        self.slots = 0  # pages on the device, beside the open one, the most of a row
        self.counts: Tensor | None = None  # [2]: pages asked for; of these, those that were not on the device
        self.ahead: Tensor | None = None  # the same of what was fetched ahead
        self.data: Tensor | None = None  # [B, K, 2, (slots + 1) page, D], keys and values; last comes the open page
        self._fresh: Tensor | None = None
        self._open: tuple[list[int], Tensor] | None = None
        self._full: list[int] = []  # rows whose open page is full
        self._coming: list[Coming] = []
        self._aside: tuple[torch.cuda.Event, Tensor, Tensor] | None = None  # host memory is being read; what says which

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredPages:
        """A copy with a fast tier of its own; home, where nothing ever changes, is shared."""
        if self.data is not None:
            self._land()
        new = copy.copy(self)
        memo[id(self)] = new
        new.lengths, new.limits, new._full, new._coming = list(self.lengths), list(self.limits), [], []
        if self.data is not None:
            for name in ("data", "table", "address", "counts", "ahead"):
                setattr(new, name, getattr(self, name).clone())
            new.residents = copy.deepcopy(self.residents)
            new._pool = ThreadPoolExecutor(1, "lcpatch-prefetch")
        return new

    @property
    def keys(self) -> Tensor:
        """[B, K, (slots + 1) page, D]"""
        return self.data[:, :, 0]

    @property
    def values(self) -> Tensor:
        """[B, K, (slots + 1) page, D]"""
        return self.data[:, :, 1]

    @property
    def direct(self) -> bool:
        """Whether home is host memory, which the device reads by itself."""
        return self.folder is None

    @property
    def room(self) -> int:
        """Pages that are reserved."""
        return self.table.shape[2]

    @property
    def num_heads(self) -> int:
        return self.data.shape[1]

    def allow(self, pages: list[int]) -> None:
        """So many full pages of each row may be on the device; never fewer than before."""
        self.limits = [max(old, new) for old, new in zip(self.limits or pages, pages, strict=True)]

    def append(self, keys: Tensor, values: Tensor, skip: list[int]) -> Iterator[tuple[list[int], int, int]]:
        """Store new tokens [B, K, T, D], of each row but the first `skip[row]`; yields as `Pages.append` does."""
        if self.data is None:
            self._begin(keys)
        self._land()
        for rows in alike(zip(self.lengths, self.limits, skip, strict=True)):
            which, first = self._rows(rows), skip[rows[0]]
            yield from self._append(rows, torch.stack([x[which, :, first:] for x in (keys, values)], 2))

    def tokens(self, rows: list[int], begin: int, end: int) -> Tensor:
        """Keys of the pages which `append` has just yielded."""
        return self._fresh

    def close(self) -> Iterator[tuple[list[int], int, int]]:
        """Send pages home that single tokens have filled, once those have attended; yields as `append` does."""
        full, self._full = self._full, []
        for some in alike([(self.lengths[row], self.limits[row]) for row in full]):
            rows = [full[n] for n in some]
            end = self.lengths[rows[0]] // self.page
            pages = self.data[self._rows(rows), :, :, self.slots * self.page :]
            self._settle(rows, end - 1, pages[:, :, None])
            self._fresh = pages[:, :, 0]
            yield rows, end - 1, end
            self._fresh = None

    def stand_still(self, pages: int) -> None:
        """Have room for so many pages and more, and the slots that those may have: nothing moves while they fit."""
        self._land()
        if pages > self.room:
            self._reserve(pages + spare(pages))
        self._widen(self.room)

    def put(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        """Write a token [B, K, 1, D] of every row, of `length` [B] with it, to the open page; counts nothing."""
        row = torch.arange(len(length), device=length.device)
        place = self.data.shape[3] - self.page + (length - 1) % self.page
        # By index: what else could be said so (a slice, `scatter_`), inductor does to a copy of the whole buffer.
        self.data[row, :, :, place] = torch.stack([keys, values], 2)[:, :, :, 0]

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
        if self.data is None or self._coming or self._aside:
            return
        slots, fresh = self.residents.take(pages, self._open_page(), self.ahead)
        if not self.direct:
            which = _where(fresh >= 0)
            if len(which):
                numbers = self._numbers(fresh)[which].cpu()
                future = self._pool.submit(self._on_the_side, numbers, torch.is_inference_mode_enabled())
                self._coming.append(Coming(which // fresh.shape[2], slots.flatten()[which], future))
        elif self._stream is None:
            self._read(fresh, slots, self.data)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(fresh.device))
            with torch.cuda.stream(self._stream):
                self._read(fresh, slots, self.data)
                self._aside = self._stream.record_event(), fresh, slots

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, K, tokens, D] on the device, for as long as the caller holds them."""
        self._land()
        batch, heads, _, _, head_dim = self.data.shape
        most, full = max(self.lengths), max(self.lengths) // self.page
        out = self.data.new_zeros(batch, heads, 2, (full + 1) * self.page, head_dim)
        slots, numbers = self.residents.slot_of[:, 1 : 1 + full], self.table.flatten(0, 1)[:, :full]
        group, page = (slots >= 0).nonzero().unbind(1)
        _by_group(out, self.page)[group, :, page] = _by_group(self.data, self.page)[group, :, slots[group, page]]
        place = torch.arange(full, device=out.device).expand(batch, heads, full)
        away = ((numbers >= 0) & (slots < 0)).view_as(place)
        if self.direct:
            self.home.from_host += int(away.sum())
        self._read(place.masked_fill(~away, -1), place.int(), out)
        for rows in alike(self.lengths):
            which, begin, rest = self._rows(rows), self.slots * self.page, self.lengths[rows[0]] % self.page
            end = self.lengths[rows[0]]
            out[which, :, :, end - rest : end] = self.data[which, :, :, begin : begin + rest]
        return out[:, :, 0, :most], out[:, :, 1, :most]

    def cut(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its new length on; a full page that is cut is open again."""
        if self.data is None:
            return
        self._land()
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            first = new // self.page
            if first == old // self.page:
                continue
            if new % self.page:
                page = torch.full((len(lengths), self.num_heads, 1), -1, device=self.data.device)
                page[row] = first
                slot = self._bring(page)[row, :, 0].long()
                pages = self.data[row].unflatten(2, (-1, self.page))
                head = torch.arange(self.num_heads, device=self.data.device)
                pages[:, :, -1] = pages[head, :, slot]
            self.residents.forget(slice(row * self.num_heads, (row + 1) * self.num_heads), first)
            self.table[row, :, first:] = -1
        self.lengths = list(lengths)

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows; those that share a past share its pages at home."""
        self.lengths = [self.lengths[r] for r in rows]
        self.limits = [self.limits[r] for r in rows] if self.limits else []
        if self.data is None:
            return
        self._land()
        self.residents.select(self._groups()[rows].flatten())
        for name in ("table", "address", "data"):
            setattr(self, name, rearranged(getattr(self, name), rows))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load` takes, or, where a page that comes back is not what it was, `restore`."""
        if self.codec.lossless:
            return dict(zip(("keys", "values"), self.whole(), strict=True)), {}
        self._land()
        table = self.table[:, :, : max(self.lengths) // self.page].cpu()
        records = self.home.read(table.clamp(min=0).flatten()).view(*table.shape, -1)
        records.masked_fill_(table[..., None] < 0, 0)
        page_in, used = (x[:, 1:].view(*table.shape[:2], -1) for x in (self.residents.page_in, self.residents.used))
        tensors = {"keys": self.keys, "values": self.values, "records": records, "page_in": page_in, "used": used}
        return tensors, {"limits": self.limits, "clock": int(self.residents.clock[0])}

    def load(self, keys: Tensor, values: Tensor, lengths: list[int], numbers: dict[str, Any]) -> None:
        """Hold the tokens [B, K, T, D] of rows that are filled from the left."""
        self._begin(keys)
        self.lengths = [0] * len(lengths)
        for rows in alike(zip(lengths, self.limits, strict=True)):
            which, end = self._rows(rows), lengths[rows[0]]
            for _ in self._append(rows, torch.stack([x[which, :, :end] for x in (keys, values)], 2)):
                pass

    def restore(self, tensors: dict[str, Tensor], lengths: list[int], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of a store with such a codec gave: pages as they lay, the same ones on the device.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        rows, full = len(lengths), [n // self.page for n in lengths]
        self._begin(like.expand(rows, -1, -1, -1))
        slots = tensors["page_in"].shape[-1]
        hot = {name: tensors[name] for name in ("keys", "values")}
        hot = fitting(hot, dict.fromkeys(hot, like), rows, (slots + 1) * self.page)
        at_home = like.new_empty(1, like.shape[1], 0, self.record.nbytes, dtype=torch.uint8)
        records = fitting({"records": tensors["records"]}, {"records": at_home}, rows, max(full))["records"]
        tables = {name: tensors[name] for name in ("page_in", "used")}
        numeral = like.new_empty(1, like.shape[1], 0, dtype=torch.int64)
        tables = fitting(tables, dict.fromkeys(tables, numeral), rows, slots)
        page_in, used, clock = tables["page_in"], tables["used"], whole(numbers, "clock")
        ends = torch.tensor(full, device=like.device)[:, None, None]
        twice = page_in.sort(-1).values.diff(dim=-1) == 0
        if ((page_in < -1) | (page_in >= ends)).any() or (twice & (page_in.sort(-1).values[..., 1:] >= 0)).any():
            raise ValueError("page_in must hold full pages of each row, each once, or -1")
        if ((used < 0) | ((used > clock) & (used != NEVER))).any():
            raise ValueError(f"used must hold times from 0 to clock={clock}")
        self.lengths, self.limits = lengths, wholes(numbers, "limits", rows)
        self.data, self.slots, self._granted = torch.stack(list(hot.values()), 2), slots, list(self.limits)
        self.residents.grow(slots, torch.tensor(self.limits, device=like.device).repeat_interleave(self.num_heads))
        self.residents.reserve(max(full))
        self.residents.restore(page_in.flatten(0, 1), used.flatten(0, 1), clock)
        self._reserve(max(full))
        self._store(slice(None), 0, records)
        self.table[:, :, : max(full)].masked_fill_(torch.arange(max(full), device=like.device) >= ends, -1)

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        if self.data is None:
            return {"device": 0}
        held = (*self.tensors, self.table, self.ahead)
        return {"device": sum(x.untyped_storage().nbytes() for x in held), **self.home.nbytes()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a token reads and writes."""
        return self.data, self.address, self.counts, *self.residents.tables

    def traffic(self) -> dict[str, int]:
        """What was asked for, what was not on the device, and what was read from where; waits for the device."""
        if self.data is None:
            return dict.fromkeys(TRAFFIC, 0)
        (wanted, missed), ahead = self.counts.tolist(), int(self.ahead[1])
        host, disk = self.home.from_host + (missed + ahead if self.direct else 0), self.home.from_disk
        found = (wanted, missed, ahead, host, disk, (host + disk) * self.record.nbytes)
        return dict(zip(TRAFFIC, found, strict=True))

    def _begin(self, keys: Tensor) -> None:
        batch, heads, _, head_dim = keys.shape
        self.record = Record(self.codec, self.page, keys.new_empty(1, heads, 0, head_dim))
        size, pinned = self.record.nbytes, keys.is_cuda
        host = self.host_bytes // size
        self.home = Arena(size, pinned) if self.direct else Disk(size, self.folder, host, pinned)
        self.residents = Residents(batch * heads, 0, keys.device)
        self.table = torch.full((batch, heads, 0), -1, device=keys.device)  # the record of each full page
        self.address = torch.full((batch, heads, 0), 0, device=keys.device)  # and where it lies, without a disk
        self.counts, self.ahead = (torch.zeros(2, dtype=torch.int64, device=keys.device) for _ in range(2))
        self.data = keys.new_zeros(batch, heads, 2, self.page, head_dim)
        self._granted: list[int] = []  # the limits that the residents know
        self._pool = ThreadPoolExecutor(1, "lcpatch-prefetch")
        self._stream = torch.cuda.Stream(keys.device) if keys.is_cuda else None

    def _append(self, rows: list[int], new: Tensor) -> Iterator[tuple[list[int], int, int]]:
        """Store the tokens [rows, K, 2, T, D] of rows that are alike."""
        page, length, which = self.page, self.lengths[rows[0]], self._rows(rows)
        rest, begin, single = length % page, length // page, new.shape[3] == 1
        length += new.shape[3]
        end = length // page
        if end > begin and single:
            self._full += rows
        elif end > begin:
            new = torch.cat([self.data[which, :, :, self.slots * page : self.slots * page + rest], new], 3)
            full = new[:, :, :, : (end - begin) * page].unflatten(3, (-1, page))
            self._settle(rows, begin, full.transpose(2, 3))
            self._fresh, new, rest = full[:, :, 0].flatten(2, 3), new[:, :, :, (end - begin) * page :], 0
        start = self.slots * page + rest
        self.data[which, :, :, start : start + new.shape[3]] = new
        for row in rows:
            self.lengths[row] = length
        if end > begin and not single:
            yield rows, begin, end
            self._fresh = None

    def _settle(self, rows: list[int], begin: int, full: Tensor) -> None:
        """Send full pages [rows, K, n, 2, page, D] home, and keep the last of them on the device."""
        num, which, end = full.shape[2], self._rows(rows), begin + full.shape[2]
        self._reserve(end)
        self._store(which, begin, self.record.pack(full.flatten(0, 2)).view(*full.shape[:3], -1))
        self._widen(end)
        kept = min(num, self.limits[rows[0]])
        page = torch.full((len(self.lengths), self.num_heads, kept), -1, device=self.table.device)
        page[which] = torch.arange(end - kept, end, device=page.device)
        slot = self.residents.take(page)[0][which].flatten()
        group = self._groups()[which].flatten().repeat_interleave(kept)
        self._put(group, slot, full[:, :, num - kept :].flatten(0, 2))

    def _reserve(self, pages: int) -> None:
        """Room for so many pages in the tables of where they lie."""
        if (missing := pages - self.room) > 0:
            more = -(-missing // GRAIN) * GRAIN
            self.table, self.address = pad(self.table, (0, more), value=-1), pad(self.address, (0, more))

    def _store(self, which: list[int] | slice, begin: int, records: Tensor) -> None:
        """Send records [rows, K, n, bytes] of pages from `begin` on home, and note where they lie."""
        first, shape, end = self.home.append(records.flatten(0, 2)), records.shape[:3], begin + records.shape[2]
        numbers = torch.arange(first, first + shape.numel())
        self.table[which, :, begin:end] = numbers.view(shape).to(self.table.device)
        if self.direct:
            places = self.home.addresses(numbers, self.table.device)
            self.address[which, :, begin:end] = places.view(shape)

    def _widen(self, pages: int) -> None:
        """Have slots for so many pages; they grow by a half, up to the limit."""
        self.residents.reserve(pages)
        limit = max(self.limits)
        if (slots := min(limit, pages)) > self.slots:
            slots = min(limit, max(slots, self.slots + self.slots // 2))
            begin, more = self.slots * self.page, (slots - self.slots) * self.page
            shape = (*self.data.shape[:3], more, self.data.shape[4])
            self.data = torch.cat([self.data[..., :begin, :], self.data.new_zeros(shape), self.data[..., begin:, :]], 3)
            self.slots, self._granted = slots, []
        if self._granted != self.limits:
            self._granted = list(self.limits)
            limits = torch.tensor(self.limits, device=self.data.device).repeat_interleave(self.num_heads)
            self.residents.grow(self.slots, limits)

    def _open_page(self) -> Tensor:
        """Each row's open page [B, 1, 1]; -2 where none has begun."""
        state = [n // self.page if n % self.page else -2 for n in self.lengths]
        if self._open is None or self._open[0] != state:
            self._open = state, torch.tensor(state).to(self.data.device)[:, None, None]
        return self._open[1]

    def _bring(self, pages: Tensor, newest: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """The slots [B, K, M] of pages (-1: none), which then are on the device."""
        slots, fresh = self.residents.take(pages, newest, counts)
        self._read(fresh, slots, self.data)
        return slots

    def _read(self, pages: Tensor, slots: Tensor, data: Tensor) -> None:
        """Bring pages [B, K, M] (-1: none) from home to these slots of `data`."""
        if self.direct:
            bring_pages(pages, slots, self.address, data, self.page, self.record.layout)
            return
        which = _where(pages >= 0)
        step = max(1, BATCH // self.record.nbytes)
        for some in (which[n : n + step] for n in range(0, len(which), step)):
            found = self.record.unpack(self._records(self._numbers(pages)[some]))
            _by_group(data, self.page)[some // pages.shape[2], :, slots.flatten()[some].long()] = found

    def _numbers(self, pages: Tensor) -> Tensor:
        """The records of pages [B, K, M], flat; of page -1, of any."""
        return self.table.gather(2, pages.clamp(min=0)).flatten()

    def _records(self, numbers: Tensor) -> Tensor:
        """They come when the stream is there."""
        return self.home.read(numbers.cpu()).to(self.data.device, non_blocking=True)

    def _on_the_side(self, numbers: Tensor, inference: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """Records of a disk, on their way to the device on a stream of its own."""
        with torch.inference_mode(inference), torch.cuda.stream(self._stream):
            records, event = self._records(numbers), None
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record(self._stream)
        return records, event

    def _land(self) -> None:
        """Let what was fetched ahead be where its slots are."""
        if self._aside is not None:
            torch.cuda.current_stream(self.data.device).wait_event(self._aside[0])
            self._aside = None
        coming, self._coming = self._coming, []
        for group, slot, future in coming:
            records, event = future.result()
            if event is not None:
                stream = torch.cuda.current_stream(records.device)
                stream.wait_event(event)
                records.record_stream(stream)
            self._put(group, slot, self.record.unpack(records))

    def _put(self, group: Tensor, slot: Tensor, pages: Tensor) -> None:
        """Write pages [n, 2, page, D] to their slots."""
        _by_group(self.data, self.page)[group, :, slot.long()] = pages

    def _rows(self, rows: list[int]) -> list[int] | slice:
        """An index of rows that costs nothing where all are meant."""
        return slice(None) if len(rows) == len(self.lengths) else rows

    def _groups(self) -> Tensor:
        """Numbers of the groups, [B, K]."""
        return torch.arange(math.prod(self.data.shape[:2]), device=self.data.device).view(self.data.shape[:2])


def _by_group(data: Tensor, page: int) -> Tensor:
    """[B, K, 2, pages * page, D] as [G, 2, pages, page, D], a view."""
    return data.flatten(0, 1).unflatten(2, (-1, page))


def _where(mask: Tensor) -> Tensor:
    """The places in a mask that hold, counted as if it were flat; waits for the device."""
    return mask.flatten().nonzero().squeeze(1)


def traffic(stores: list[TieredPages]) -> dict[str, Any]:
    """What `stats` says of pages that lie elsewhere: see `TieredCache.stats`."""
    total = Counter()
    for store in stores:
        total.update(store.traffic())
    wanted, missed = total.pop("wanted", 0), total.pop("missed", 0)
    return {"hit_rate": 1 - missed / wanted if wanted else 1.0, **total}
