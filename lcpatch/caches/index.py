"""What a `PagedLayer` asks of an index: `retrieval.ScorerIndex` and `tree.TreeIndex` are some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .paged import Marks


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
