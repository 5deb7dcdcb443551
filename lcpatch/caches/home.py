"""The home of full pages: each is a record in host memory or on a disk, found by its row, KV head and number."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import bring_pages

from .arena import Arena
from .pages import by_group
from .records import Record
from .residents import GRAIN
from .rows import rearranged
from .spill import Disk
from .untrusted import fitting

BATCH = 64 << 20  # bytes of records of a disk that are on their way at a time


class Home:
    """Where a device's pages are written once, and read from ever after.

    Args:
        record: a page as bytes.
        rows, heads, device: of the pages.
        folder: of a file for what host memory does not hold; None: it holds all.
        host_bytes: with a folder, what host memory may hold.
    """

    def __init__(
        self, record: Record, rows: int, heads: int, device: torch.device, folder: str | Path | None, host_bytes: int
    ) -> None:
        self.record, pinned = record, device.type == "cuda"
        self.direct = folder is None  # whether the device reads it by itself
        self.store = Arena(record.nbytes, pinned)
        if folder is not None:
            self.store = Disk(record.nbytes, folder, host_bytes // record.nbytes, pinned)
        self.table = torch.full((rows, heads, 0), -1, device=device)  # the record of each page
        self.address = torch.full((rows, heads, 0), 0, device=device)  # and where in memory it lies, if direct

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        """The same records, which never change."""
        new = copy.copy(self)
        new.table, new.address = self.table.clone(), self.address.clone()
        return new

    @property
    def room(self) -> int:
        """Pages that are reserved."""
        return self.table.shape[2]

    def reserve(self, pages: int) -> None:
        if (missing := pages - self.room) > 0:
            more = -(-missing // GRAIN) * GRAIN
            self.table, self.address = pad(self.table, (0, more), value=-1), pad(self.address, (0, more))

    def put(self, which: Tensor | slice, begin: int, records: Tensor) -> None:
        """Store records [rows, K, n, bytes] of these rows' pages from `begin` on."""
        first, shape, end = self.store.append(records.flatten(0, 2)), records.shape[:3], begin + records.shape[2]
        numbers = torch.arange(first, first + shape.numel())
        self.reserve(end)
        self.table[which, :, begin:end] = numbers.view(shape).to(self.table.device)
        if self.direct:
            self.address[which, :, begin:end] = self.store.addresses(numbers, self.address.device).view(shape)

    def bring(self, pages: Tensor, slots: Tensor, data: Tensor) -> None:
        """Read pages [B, K, M] (-1: none) to these slots of `data` [B, K, 2, slots page, D]."""
        if self.direct:
            bring_pages(pages, slots, self.address, data, self.record.page, self.record.layout)
            return
        group, slot, numbers = self.listed(pages, slots)
        step = max(1, BATCH // self.record.nbytes)
        for n in range(0, len(numbers), step):
            found = self.record.unpack(self.fetch(numbers[n : n + step]))
            by_group(data, self.record.page)[group[n : n + step], :, slot[n : n + step]] = found

    def listed(self, pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the pages [B, K, M] that are not -1, one after another: their groups, their slots, and on the host
        their records; waits for the device."""
        group, place = (pages >= 0).flatten(0, 1).nonzero().unbind(1)
        page, slot = (x.flatten(0, 1)[group, place].long() for x in (pages, slots))
        return group, slot, self.table.flatten(0, 1)[group, page].cpu()

    def fetch(self, numbers: Tensor) -> Tensor:
        """These records [n, bytes], there when the device's stream is."""
        return self.store.read(numbers).to(self.table.device, non_blocking=True)

    def state(self, pages: int) -> Tensor:
        """On the host, the records [B, K, pages, bytes] of each row's first pages, zero where there is none."""
        table = self.table[:, :, :pages].cpu()
        records = self.store.read(table.clamp(min=0).flatten()).view(*table.shape, self.record.nbytes)
        return records.masked_fill_(table[..., None] < 0, 0)

    def restore(self, records: Tensor, full: list[int]) -> None:
        """Take what `state` gave of rows that have so many pages.

        Raises:
            ValueError: it does not fit.
        """
        rows, heads = self.table.shape[:2]
        like = torch.empty(1, heads, 0, self.record.nbytes, dtype=torch.uint8)
        found = fitting({"records": records}, {"records": like}, rows, max(full))
        self.put(slice(None), 0, found["records"])
        for row, pages in enumerate(full):
            self.cut(row, pages)

    def cut(self, row: int, pages: int) -> None:
        """Forget the pages of a row from `pages` on."""
        self.table[row, :, pages:] = -1

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows; those that share a past share its pages."""
        self.table, self.address = rearranged(self.table, rows), rearranged(self.address, rows)
