"""The index of a tiered cache: a tree of bounds, and what it proves."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .marks import FixedMarks, Marks, Now
from .reads import Reads
from .tree import BoundTree, possible


class TreeIndex:
    """The tree of bounds of a layer's pages, and what it proves.

    Args:
        reads: which pages are read anyway.
        top: best keys to find; None: a quarter of the tokens read.
        num_rows: batch rows.
        flat: one level only, for `fixed_scores`.
    """

    def __init__(self, reads: Reads, top: int | None, num_rows: int, flat: bool = False) -> None:
        self.reads, self.top = reads, top
        self.tree = BoundTree(reads.page, num_rows, sys.maxsize if flat else None)
        self.fits: Tensor | None = None  # bool [B, K]: whether all that the last search could not drop may be read
        self.found: Tensor | None = None  # how many of `fixed_scores` found that it may, since someone set it to 0

    def append(self, keys: Tensor, rows: list[int], begin: int, room: int) -> None:
        self.tree.append(keys, rows)

    def scores(self, query: Tensor, marks: Marks, scale: float | None) -> Tensor:
        """The upper bounds of the pages that may hold one of the best keys; -inf for those that provably do not."""
        pages, scores = self.tree.search(query, self._tops(marks.limits))
        if len(self.tree.levels) > 1:
            found, scores = scores, scores.new_full((*scores.shape[:2], marks.most + 1), -torch.inf)
            scores.scatter_(2, pages.masked_fill(found == -torch.inf, marks.most).clamp(max=marks.most), found)
        scores = scores[..., : marks.most]
        read = ((scores > -torch.inf) | marks.always) & marks.real
        self.fits = read.sum(-1) < marks.budgets[..., 0]
        return scores

    def stand_still(self, pages: int, like: Tensor) -> None:
        """Have room for so many pages, [B, K, 0, D] as `like`."""
        self.tree.reserve(pages, like)
        if self.found is None:
            self.found = torch.zeros((), dtype=torch.int64, device=like.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `fixed_scores` reads and writes."""
        return *self.tree.levels[0], self.tree.largest, self.found

    def fixed_scores(self, query: Tensor, fixed: FixedMarks, now: Now, scale: float | None) -> Tensor:
        """As `scores`, over all pages that there is room for: shapes and control follow from no length."""
        upper, lower = self.tree.bounds(query, fixed.place.shape[0])
        best = lower.topk(fixed.best.shape[0], -1).values
        scores = possible(upper, best.gather(-1, fixed.kth.expand(*best.shape[:3], 1)).squeeze(-1))
        read = ((scores > -torch.inf) | now.always) & now.real
        self.found.add_((read.sum(-1) < fixed.budgets[..., 0]).sum())
        return scores

    def top_pages(self, limits: list[int]) -> list[int]:
        """How many pages hold the best keys that rows which read so many look for."""
        return [-(-n // self.reads.page) for n in self._tops(limits)]

    def _tops(self, limits: list[int]) -> list[int]:
        return [self.top or max((pages - 1) * self.reads.page // 4, 1) for pages in limits]

    def state(self, pages: int, like: Tensor) -> dict[str, Tensor]:
        self.tree.reserve(pages, like)
        return {name: x[:, :, :pages] for name, x in zip(("low", "high"), self.tree.levels[0], strict=True)}

    def likes(self, like: Tensor) -> dict[str, Tensor]:
        return {"low": like, "high": like}

    def append_known(self, known: dict[str, Tensor], rows: list[int], room: int) -> None:
        self.tree.append_bounds(known["low"], known["high"], rows)

    def cut(self, row: int, pages: int) -> None:
        self.tree.cut(row, pages)

    def select_rows(self, rows: list[int]) -> None:
        self.tree.select_rows(rows)

    @property
    def nbytes(self) -> int:
        return self.tree.nbytes
