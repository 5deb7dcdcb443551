"""What layers of pages ask of an index: `ScorerIndex` and `TreeIndex` are some."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .marks import FixedMarks, Marks, Now


class Index(Protocol):
    """What is known of a layer's full pages without reading them."""

    nbytes: int

    def append(self, keys: Tensor, rows: list[int], begin: int, room: int) -> None:
        """Take the keys [rows, K, tokens, D] of the pages from `begin` on; `room` pages are reserved in all."""

    def scores(self, query: Tensor, marks: Marks, scale: float | None) -> Tensor:
        """How well the pages before each row's newest fit, fp32 [B, K, most of a row]; -inf: not at all.

        `scale` is the attention's factor of q k; None: 1 / sqrt(D).
        """

    def cut(self, row: int, pages: int) -> None:
        """Forget the pages of a row from `pages` on."""

    def select_rows(self, rows: list[int]) -> None:
        """Keep these batch rows, in that order; where there are as many, in the same tensors."""

    # For a file, where the keys that it was made of do not come back as they were; `like` [B, K, 0, D] is as they.

    def state(self, pages: int, like: Tensor) -> dict[str, Tensor]:
        """What is known of each row's first `pages`, [B, K, pages, …]."""

    def likes(self, like: Tensor) -> dict[str, Tensor]:
        """What the tensors of `state` are like."""

    def append_known(self, known: dict[str, Tensor], rows: list[int], room: int) -> None:
        """Take that of the first pages of `rows`, which have none."""


class FixedIndex(Index, Protocol):
    """The same for a layer that generates in tensors which never move (`fixed_pages`)."""

    tensors: tuple[Tensor, ...]
    """What `fixed_scores` and `put` read and write."""

    def stand_still(self, pages: int, like: Tensor) -> None:
        """Have room for so many pages, [B, K, 0, D] as `like`: `tensors` stay where they are while those suffice."""

    def top_pages(self, limits: list[int]) -> list[int]:
        """Of rows that read so many pages, how many hold the best keys that are looked for; empty: none are."""

    def fixed_scores(self, query: Tensor, fixed: FixedMarks, now: Now, scale: float | None) -> Tensor:
        """As `scores`, over all pages that there is room for: shapes and control follow from no length."""


class OpenIndex(FixedIndex, Protocol):
    """The same where all pages lie on the device, so that no step between two tokens tells it of a full one."""

    def put(self, keys: Tensor, newest: Tensor) -> None:
        """Take the page [B, K, page, D] of every row, its open one, as number `newest` [B, 1, 1], full or not."""
