"""Which pages are where: for every group (a row's KV head) a few slots, and the page used longest ago leaves first.

Everything is a tensor on the device that asks, so that finding and placing wait for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import take_slots

from .rows import rearranged

NEVER = 1 << 62  # when a slot was used that its group may not have: it never leaves first

GRAIN = 256  # pages by which a table of them grows


class Residents:
    """Pages 0, 1, … of every group, some of which have one of the group's slots.

    The first column of each table stands for no slot, and no page: there, what is read is -1, and what is written
    changes nothing.

    Args:
        groups, slots: how many.
        device: of the tables.
    """

    def __init__(self, groups: int, slots: int, device: torch.device | str = "cpu") -> None:
        self.page_in = torch.full((groups, 1 + slots), -1, device=device)
        self.used = torch.zeros(groups, 1 + slots, dtype=torch.int64, device=device)  # when; 0: free
        self.slot_of = torch.full((groups, 1), -1, device=device)
        self.clock = torch.zeros(groups, dtype=torch.int64, device=device)

    @property
    def num_slots(self) -> int:
        return self.page_in.shape[1] - 1

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.page_in, self.used, self.slot_of, self.clock

    def find(self, page: Tensor) -> Tensor:
        """The slots [G, n] of the pages [G, n] of every group, -1 for those without, and for page -1; what is found
        counts as used now."""
        self.clock += 1
        slot = self.slot_of.gather(1, page + 1)
        self.used.scatter_(1, slot + 1, self.clock[:, None].expand_as(slot))
        return slot

    def take(self, pages: Tensor, newest: Tensor | None = None, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(slots, fresh)` of pages [B, K, M], at most all slots of a group: see `take_slots`."""
        return take_slots(pages, newest, *self.tables, counts)

    def forget(self, groups: slice, first: int) -> None:
        """Free the slots of these groups' pages from `first` on."""
        self.slot_of[groups, 1 + first :] = -1
        gone = self.page_in[groups] >= first
        self.page_in[groups].masked_fill_(gone, -1)
        self.used[groups].masked_fill_(gone, 0)

    def select(self, groups: Tensor) -> None:
        """Keep these groups, in that order; one may come several times."""
        self.page_in, self.used, self.slot_of, self.clock = (rearranged(x, groups) for x in self.tables)

    def grow(self, slots: int, limits: Tensor) -> None:
        """Have this many slots in each group, of which a group uses `limits` [G]: no fewer than before."""
        more = slots - self.num_slots
        self.page_in, self.used = pad(self.page_in, (0, more), value=-1), pad(self.used, (0, more), value=NEVER)
        place = torch.arange(slots, device=limits.device)
        self.used[:, 1:].masked_fill_((place < limits[:, None]) & (self.used[:, 1:] == NEVER), 0)

    def restore(self, page_in: Tensor, used: Tensor, clock: int, ends: Tensor) -> None:
        """Hold what another's tables [G, slots] said, without their first columns; slots and pages are reserved.

        Raises:
            ValueError: a page twice, one that the group's first `ends` [G] are not, or a time that has not come.
        """
        ordered = page_in.sort(-1).values
        twice = (ordered.diff(dim=-1) == 0) & (ordered[:, 1:] >= 0)
        if ((page_in < -1) | (page_in >= ends[:, None])).any() or twice.any():
            raise ValueError("page_in must hold full pages of each row, each once, or -1")
        if ((used < 0) | ((used > clock) & (used != NEVER))).any():
            raise ValueError(f"used must hold times from 0 to clock={clock}")
        self.page_in[:, 1:], self.used[:, 1:] = page_in, used
        self.clock.fill_(clock)
        self.slot_of.scatter_(
            1, self.page_in + 1, torch.arange(-1, self.num_slots, device=used.device).expand_as(self.used)
        )
        self.slot_of[:, 0] = -1

    def reserve(self, pages: int) -> None:
        """Room for pages 0 … pages - 1."""
        if (missing := 1 + pages - self.slot_of.shape[1]) > 0:
            self.slot_of = pad(self.slot_of, (0, -(-missing // GRAIN) * GRAIN), value=-1)
