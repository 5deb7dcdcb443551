"""Which pages are where: for every group (a row's KV head) a few slots, and the page used longest ago leaves first."""

from __future__ import annotations

import numpy as np


class Residents:
    """Pages 0, 1, … of every group, some of which have one of the group's slots. On the host, many at a time.

    Args:
        groups, slots: how many.
    """

    def __init__(self, groups: int, slots: int) -> None:
        self.page_in = np.full((groups, slots), -1, np.int64)
        self.used = np.zeros((groups, slots), np.int64)  # when; 0: free
        self.slot_of = np.full((groups, 0), -1, np.int64)
        self.clock = 0

    @property
    def num_slots(self) -> int:
        return self.page_in.shape[1]

    def find(self, group: np.ndarray, page: np.ndarray) -> np.ndarray:
        """The slots of pages [n] of groups [n], -1 where a page has none; those that are found count as used now."""
        self.clock += 1
        self._reserve(page)
        slot = self.slot_of[group, page]
        here = slot >= 0
        self.used[group[here], slot[here]] = self.clock
        return slot

    def place(self, group: np.ndarray, page: np.ndarray) -> np.ndarray:
        """Give a slot to pages that have none, in place of those used longest ago; at most all slots of a group."""
        if not len(group):
            return np.zeros(0, np.int64)
        self.clock += 1
        self._reserve(page)
        order = np.argsort(group, kind="stable")
        sorted_group = group[order]
        begin = np.searchsorted(sorted_group, sorted_group)  # where its group begins
        which, row = np.unique(sorted_group, return_inverse=True)
        oldest = np.argsort(self.used[which], axis=1, kind="stable")
        slot = np.empty_like(page)
        slot[order] = oldest[row, np.arange(len(order)) - begin]
        before = self.page_in[group, slot]
        gone = before >= 0
        self.slot_of[group[gone], before[gone]] = -1
        self.page_in[group, slot], self.slot_of[group, page] = page, slot
        self.used[group, slot] = self.clock
        return slot

    def forget(self, group: int, first: int) -> None:
        """Free the slots of a group's pages from `first` on."""
        self.slot_of[group, first:] = -1
        gone = self.page_in[group] >= first
        self.page_in[group, gone], self.used[group, gone] = -1, 0

    def select(self, groups: np.ndarray) -> None:
        """Keep these groups, in that order; one may come several times."""
        self.page_in, self.used, self.slot_of = (x[groups] for x in (self.page_in, self.used, self.slot_of))

    def grow(self, slots: int) -> None:
        """Add slots, to this many in each group."""
        more = ((0, 0), (0, slots - self.num_slots))
        self.page_in = np.pad(self.page_in, more, constant_values=-1)
        self.used = np.pad(self.used, more)

    def _reserve(self, page: np.ndarray) -> None:
        missing = (int(page.max()) + 1 if len(page) else 0) - self.slot_of.shape[1]
        if missing > 0:
            self.slot_of = np.pad(self.slot_of, ((0, 0), (0, missing + missing // 2)), constant_values=-1)
