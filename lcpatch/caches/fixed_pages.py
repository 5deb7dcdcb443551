"""Generating from pages with tensors that never move: a step that a CUDA graph can replay.

Within such a step a token is only appended to its row's open page; pages are chosen on the device, and where they lie
on several tiers, given slots and fetched there. What such a page asks for that has become full (its summary, its way
home, a slot) waits until the next step is prepared, and without `compiled` until the token that filled it has attended:
both choose and fetch the same. Pages on the device have nowhere to go, and every step sums up the open one anew, which
nobody chooses before it is full: so nothing has to be prepared until there is no room for another page.
"""

from __future__ import annotations

from torch import Tensor

from ..hf.watch import Call
from .fixed import FixedLayer, Steps, still
from .layer import decode
from .marks import FixedMarks


class FixedPages(FixedLayer):
    """The part of a `PagedLayer` that generates so. Its index is a `FixedIndex`; over `Pages`, an `OpenIndex`."""

    unit = "pages"

    def _clear(self) -> None:
        super()._clear()
        self.fixed: FixedMarks | None = None

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        return self.pages.lengths

    def can_enter(self) -> bool:
        """Whether every row has begun."""
        return bool(self.budgets) and all(self.seen > pads for pads in self.pads)

    def keep_last_step(self) -> None:
        """Nothing waits for it."""

    def _lay_out(self, steps: Steps) -> None:
        """Room for more pages, and all slots that those may have, so that nothing moves for many tokens."""
        page, lengths = self.reads.page, self.pages.lengths
        self.pages.stand_still(max(lengths) // page + 1)
        self.index.stand_still(self.pages.room, self.pages.keys[:, :, :0])
        still(*self.pages.tensors, *self.index.tensors)
        room, limits = self.pages.room, self._limits([n + 1 for n in lengths])
        tops = [min(n, room) for n in self.index.top_pages(limits)]
        limits, fixed = [min(n, room + 1) for n in limits], steps.shared.get(page)  # more there is not to be read
        if fixed is None or fixed.state != (limits, tops, room):
            fixed = steps.shared[page] = FixedMarks(limits, tops, room, self.device)
        self.fixed, self._marks, self._asked = fixed, None, None
        closing = min(page - n % page for n in lengths)
        self._until = self.seen + (closing if self.pages.apart else room * page - max(lengths))

    def _take_back(self, taken: int) -> None:
        """Count the rows, and send full pages home."""
        if not taken:
            return
        self.pages.filled(taken)
        self.read = min(self.reads.page * max(self._limits(self.counts)), max(self.counts))
        self._fill_index(self.pages.close())

    def _fixed_step(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row: store, choose, fetch, attend."""
        length = self.steps.span[:, 1] - self.steps.span[:, 0]
        self.pages.put(keys, values, length)
        now = self.fixed.now(length, self.reads, keys.shape[1])
        if not self.pages.apart:
            self.index.put(self.pages.page_of(now.newest), now.newest)
        scores = self.index.fixed_scores(call.query.to(self.dtype), self.fixed, now, call.scale)
        pages = self._best(scores.masked_fill(now.newest < self.fixed.budgets, 0), now)
        slots = self.pages.bring(pages, now.newest)
        which = {"slots": slots, "num_keys": now.num_keys, "page_size": self.reads.page}
        return decode(call, self.pages.keys, self.pages.values, **which)

    def tiers(self) -> dict[str, int]:
        self.leave_fixed()
        return super().tiers()
