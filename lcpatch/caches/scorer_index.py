"""The index of a retrieval cache: what a scorer remembers of every page, and how well that fits a KV head's queries."""

from __future__ import annotations

import torch
from torch import Tensor

from .marks import FixedMarks, Marks, Now
from .rows import rearranged
from .scorers import Scorer

GROUPS = ("max", "softmax")


class ScorerIndex:
    """What a scorer remembers of every page, [B, K, pages, …].

    Args:
        scorer: of this layer.
        page: tokens a page.
        group: how the query heads of a KV head are put together.
        num_rows: batch rows.
    """

    def __init__(self, scorer: Scorer, page: int, group: str, num_rows: int) -> None:
        self.scorer, self.page, self.group, self.num_rows = scorer, page, group, num_rows
        self.summary: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, rows: list[int], begin: int, room: int) -> None:
        self._append(self.scorer.summarise(keys, self.page), rows, begin, room)

    def _append(self, new: tuple[Tensor, ...], rows: list[int], begin: int, room: int) -> None:
        self._reserve(room, new)
        for own, x in zip(self.summary, new, strict=True):
            own[rows, :, begin : begin + x.shape[2]] = x

    def _reserve(self, room: int, like: tuple[Tensor, ...]) -> None:
        """Room for so many pages, remembered by what `like` is."""
        if not self.summary:
            self.summary = tuple(x.new_zeros(self.num_rows, x.shape[1], 0, *x.shape[3:]) for x in like)
        if (missing := room - self.summary[0].shape[2]) > 0:
            self.summary = tuple(
                torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2) for x in self.summary
            )

    def scores(self, query: Tensor, marks: Marks, scale: float | None) -> Tensor:
        return self._scores(query, tuple(x[:, :, : marks.most] for x in self.summary), marks.real, scale)

    def _scores(self, query: Tensor, summary: tuple[Tensor, ...], real: Tensor, scale: float | None) -> Tensor:
        scores = self.scorer.score(query, summary)
        scores = scores.unflatten(1, (summary[0].shape[1], -1))  # [B, K, H // K, pages]
        if self.group == "max":
            return scores.amax(2)
        # A row's shares are its own: pages that it has not must not get any.
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (scores * scale).masked_fill(~real[:, None], -torch.inf).softmax(-1).sum(2).nan_to_num()

    # For a layer that generates in tensors which never move.

    def stand_still(self, pages: int, like: Tensor) -> None:
        """Have room for so many pages, [B, K, 0, D] as `like`."""
        self._reserve(pages, self.summary or self.scorer.summarise(_one_page(like, self.page), self.page))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a step reads and writes."""
        return self.summary

    def put(self, keys: Tensor, newest: Tensor) -> None:
        """Take the page [B, K, page, D] of every row, its open one, as number `newest` [B, 1, 1], full or not."""
        row, place = torch.arange(len(newest), device=newest.device), newest.flatten()
        for own, x in zip(self.summary, self.scorer.summarise(keys, self.page), strict=True):
            own[row, :, place] = x[:, :, 0]  # by index, as in `TieredPages.put`

    def fixed_scores(self, query: Tensor, fixed: FixedMarks, now: Now, scale: float | None) -> Tensor:
        """As `scores`, over all pages that there is room for: shapes and control follow from no length."""
        return self._scores(query, tuple(x[:, :, : fixed.place.shape[0]] for x in self.summary), now.real, scale)

    # For a file.

    def state(self, pages: int, like: Tensor) -> dict[str, Tensor]:
        self.stand_still(pages, like)
        return {f"summary{n}": x[:, :, :pages] for n, x in enumerate(self.summary)}

    def likes(self, like: Tensor) -> dict[str, Tensor]:
        return {f"summary{n}": x for n, x in enumerate(self.scorer.summarise(_one_page(like, self.page), self.page))}

    def append_known(self, known: dict[str, Tensor], rows: list[int], room: int) -> None:
        self._append(tuple(known.values()), rows, 0, room)

    def top_pages(self, limits: list[int]) -> list[int]:
        """None: it looks for no keys."""
        return []

    def cut(self, row: int, pages: int) -> None:
        """Nothing to do: a page that is not full is not looked at, and written anew when it is."""

    def select_rows(self, rows: list[int]) -> None:
        self.num_rows = len(rows)
        self.summary = tuple(rearranged(x, rows) for x in self.summary)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.summary)


def _one_page(like: Tensor, page: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], page, like.shape[3])
