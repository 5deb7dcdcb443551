"""What a choice of pages needs of the rows' lengths, as tensors.

`Marks` are made of lengths that the host knows, `Now` of lengths on the device, in a step that a graph replays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fixed import still
from .reads import Reads


class Marks:
    """Where each row's newest page is, and what else the choice of pages needs of it, as tensors [B, 1, 1 or pages].

    Args:
        lengths: tokens of each row.
        state: of each row its newest page and the first of its recent ones, -1 or less: none.
        limits: pages that each row reads.
        reads: tokens a page, and the pages that are always read.
        num_heads, device: of the pages.
    """

    def __init__(
        self,
        lengths: list[int],
        state: list[tuple[int, int]],
        limits: list[int],
        reads: Reads,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.lengths, self.state, self.limits, page = list(lengths), state, limits, reads.page
        self.most = max(0, *(newest for newest, _ in state))  # pages to choose from
        self.chosen = min(max(limits) - 1, self.most)
        self.some_whole = any(newest < limit for (newest, _), limit in zip(state, limits, strict=True))
        counts = [self.chosen * page + n - newest * page for n, (newest, _) in zip(lengths, state, strict=True)]
        rows = [[newest, recent, most, n] for (newest, recent), most, n in zip(state, limits, counts, strict=True)]
        table = torch.tensor(rows).to(device)
        self.newest, recent, self.budgets = (table[:, n, None, None] for n in range(3))
        self.num_keys = table[:, 3:].expand(-1, num_heads).to(torch.int32).contiguous()
        place = torch.arange(max(self.most, self.chosen), device=device)
        self.real = place[: self.most] < self.newest  # pages that a row may choose
        self.always = (place[: self.most] < reads.sink_pages) | (place[: self.most] >= recent)
        self.beyond = place[: self.chosen] >= self.budgets - 1  # ranks of chosen pages that a row does not read


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
