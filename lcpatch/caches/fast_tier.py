"""The fast tier: the pages that the device holds as they came."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import by_group
from .residents import Residents
from .rows import rearranged
from .untrusted import fitting, size


class FastTier:
    """For every (row, KV head), a group, some full pages in slots, and behind them the row's open page.

    Args:
        page: tokens a page.
        keys: [B, K, T, D], as the model computes them.
    """

    def __init__(self, page: int, keys: Tensor) -> None:
        rows, heads, _, head_dim = keys.shape
        self.page = page
        self.data = keys.new_zeros(rows, heads, 2, page, head_dim)  # [B, K, 2, (slots + 1) page, D], keys and values
        self.residents = Residents(rows * heads, 0, keys.device)
        self._limits: list[int] = []  # that the residents know

    @property
    def slots(self) -> int:
        """Full pages that there is room for, the most of a row."""
        return self.data.shape[3] // self.page - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.data, *self.residents.tables

    def open_pages(self, which: Tensor | slice) -> Tensor:
        """[rows, K, 2, page, D]; a view of all rows."""
        return self.data[which, :, :, self.slots * self.page :]

    def widen(self, pages: int, limits: list[int]) -> None:
        """Have slots for so many pages, of each row up to its limit; they grow by a half."""
        self.residents.reserve(pages)
        limit, held = max(limits), self.slots
        if (slots := min(limit, pages)) > held:
            slots = min(limit, max(slots, held + held // 2))
            self._resize(slots)
        if self._limits != limits or slots > held:
            self._grant(limits)

    def put(self, group: Tensor, slot: Tensor, pages: Tensor) -> None:
        """Write pages [n, 2, page, D] to their slots."""
        by_group(self.data, self.page)[group, :, slot] = pages

    def keep(self, which: Tensor | slice, end: int, pages: Tensor) -> None:
        """Give slots to these rows' full pages [rows, K, n, 2, page, D], the last of which is `end` - 1."""
        num = pages.shape[2]
        page = torch.full((*self.data.shape[:2], num), -1, device=self.data.device)
        page[which] = torch.arange(end - num, end, device=page.device)
        slot = self.residents.take(page)[0][which].flatten().long()
        self.put(self._groups()[which].flatten().repeat_interleave(num), slot, pages.flatten(0, 2))

    def copy_to(self, out: Tensor, pages: int) -> Tensor:
        """Copy what is held of the first pages to their places in `out`; returns which those are, [B, K, pages]."""
        slots = self.residents.slot_of[:, 1 : 1 + pages]
        group, page = (slots >= 0).nonzero().unbind(1)
        by_group(out, self.page)[group, :, page] = by_group(self.data, self.page)[group, :, slots[group, page]]
        return (slots >= 0).view(*self.data.shape[:2], pages)

    def reopen(self, row: int, slot: Tensor) -> None:
        """Let the pages of a row in these slots [K], one of each KV head, be open again."""
        pages = self.data[row].unflatten(2, (-1, self.page))
        pages[:, :, -1] = pages[torch.arange(len(slot), device=slot.device), :, slot.long()]

    def cut(self, row: int, pages: int) -> None:
        """Forget the full pages of a row from `pages` on."""
        heads = self.data.shape[1]
        self.residents.forget(slice(row * heads, (row + 1) * heads), pages)

    def select_rows(self, rows: list[int]) -> None:
        self.residents.select(self._groups()[rows].flatten())
        self.data = rearranged(self.data, rows)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """What `restore` takes: tensors, and the residents' clock."""
        held, heads = self.residents, self.data.shape[1]
        tables = {name: getattr(held, name)[:, 1:].unflatten(0, (-1, heads)) for name in ("page_in", "used")}
        return {"keys": self.data[:, :, 0], "values": self.data[:, :, 1], **tables}, int(held.clock[0])

    def restore(self, tensors: dict[str, Tensor], clock: int, limits: list[int], full: list[int]) -> None:
        """Hold what `state` gave of rows that have so many full pages, and up to their limits on the device.

        Raises:
            ValueError: it does not fit.
        """
        rows, heads, slots = len(full), self.data.shape[1], size(tensors, "page_in", 2)
        like, number = self.data[:1, :, 0, :0], self.residents.page_in.new_empty(1, heads, 0)
        hot = {name: tensors[name] for name in ("keys", "values")}
        hot = fitting(hot, dict.fromkeys(hot, like), rows, (slots + 1) * self.page)
        tables = {name: tensors[name] for name in ("page_in", "used")}
        tables = fitting(tables, dict.fromkeys(tables, number), rows, slots)
        self.data = torch.stack(list(hot.values()), 2)
        self._grant(limits)
        self.residents.reserve(max(full))
        ends = torch.tensor(full, device=self.data.device).repeat_interleave(heads)
        self.residents.restore(*(x.flatten(0, 1) for x in tables.values()), clock, ends)

    def _resize(self, slots: int) -> None:
        begin, more = self.slots * self.page, (slots - self.slots) * self.page
        added = self.data.new_zeros(*self.data.shape[:3], more, self.data.shape[4])
        self.data = torch.cat([self.data[..., :begin, :], added, self.data[..., begin:, :]], 3)

    def _grant(self, limits: list[int]) -> None:
        self._limits = list(limits)
        of_groups = torch.tensor(limits, device=self.data.device).repeat_interleave(self.data.shape[1])
        self.residents.grow(self.slots, of_groups)

    def _groups(self) -> Tensor:
        """Numbers of the groups, [B, K]."""
        shape = self.data.shape[:2]
        return torch.arange(shape.numel(), device=self.data.device).view(shape)
