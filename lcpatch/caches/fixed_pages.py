"""Generating from pages with tensors that never move: a step that a CUDA graph can replay.

Within such a step a token is only appended to its row's open page; pages are chosen on the device, and where they lie
on several tiers, given slots and fetched there. What such a page asks for that has become full (its summary, its way
home, a slot) waits until the next step is prepared, and without `compiled` until the token that filled it has attended:
both choose and fetch the same. Pages on the device have nowhere to go, and every step sums up the open one anew, which
nobody chooses before it is full: so nothing has to be prepared until there is no room for another page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hf.watch import Call
from .fixed import FixedLayer, Steps, still
from .layer import decode
from .paged import Reads
from .scattered import is_dense


class Now(NamedTuple):
    """What a choice of pages needs of the rows' lengths at one token, as `Marks`: tensors [B, 1, 1 or pages]."""

    newest: Tensor
    num_keys: Tensor
    real: Tensor
    always: Tensor
    beyond: Tensor
    chosen: int


class FixedMarks:
    """The part of it that does not change while a page fills, for all layers of a device with pages of this size.

    Sizes are those of tensors: a number that changes from one turn to the next would be compiled as a variable.

    Args:
        limits: pages that each row reads.
        tops: of these rows, how many pages hold the best keys that are looked for; empty: none are.
        room: pages that there may be.
    """

    def __init__(self, limits: list[int], tops: list[int], room: int, device: torch.device) -> None:
        self.state = limits, tops, room
        self.budgets = torch.tensor(limits, device=device)[:, None, None]
        self.kth = torch.tensor(tops, device=device)[:, None, None, None] - 1
        self.place, self.rank = torch.arange(room, device=device), torch.arange(max(limits) - 1, device=device)
        self.best = torch.empty(max(tops, default=0), device=device)  # for its size
        still(self.budgets, self.kth, self.place, self.rank, self.best)

    def now(self, length: Tensor, reads: Reads, num_heads: int) -> Now:
        """At rows of `length` [B] tokens, the newest included."""
        page, chosen = reads.page, self.rank.shape[0]
        length = length.long()[:, None, None]
        newest = (length - 1) // page
        real = self.place < newest
        always = (self.place < reads.sink_pages) | (self.place >= (length - reads.recent) // page)
        num_keys = (chosen * page + length - newest * page)[:, :, 0].expand(-1, num_heads).to(torch.int32).contiguous()
        return Now(newest, num_keys, real, always, self.rank >= self.budgets - 1, chosen)


class FixedPages(FixedLayer):
    """The part of a `PagedLayer` that generates so."""

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

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """As every paged layer, in tensors that stay where they are if it has entered them."""
        if self.steps is not None and call.query.shape[2] == 1 and is_dense(call.spec):
            return self._fixed_step(call)
        self.leave_fixed()
        return super().attend(call)

    def _fixed_step(self, call: Call) -> tuple[Tensor, Tensor]:
        """One token a row: store, choose, fetch, attend."""
        (keys, values), self._new = self._new, None
        steps = self.steps
        if self.leads:
            steps.span[:, 1].add_(1)
        length = steps.span[:, 1] - steps.span[:, 0]
        self.pages.put(keys, values, length)
        now = self.fixed.now(length, self.reads, keys.shape[1])
        if not self.pages.apart:
            self.index.put(self.pages.page_of(now.newest), now.newest)
        scores = self.index.fixed_scores(call.query.to(self.dtype), self.fixed, now, call.scale)
        pages = self._best(scores.masked_fill(now.newest < self.fixed.budgets, 0), now)
        slots = self.pages.bring(pages, now.newest)
        which = {"slots": slots, "num_keys": now.num_keys, "page_size": self.reads.page}
        answer = decode(call, self.pages.keys, self.pages.values, **which)
        if self.ends:
            steps.seen.add_(1)
        return answer

    # Whoever asks or changes what is kept.

    def crop(self, tokens_to_remove: int) -> None:
        self.leave_fixed()
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.leave_fixed()
        super().batch_select_indices(indices)

    def tiers(self) -> dict[str, int]:
        self.leave_fixed()
        return super().tiers()

    def kept_of_rows(self) -> list[tuple[int, int]]:
        self.leave_fixed()
        return super().kept_of_rows()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.leave_fixed()
        return super().state()
