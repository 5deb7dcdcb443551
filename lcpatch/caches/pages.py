"""Every token of every row, in pages that are counted from the row's first real token: page n of a row holds its tokens
[n page, (n + 1) page). Pads are never stored, so a page means the same whoever stands beside the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .residents import GRAIN
from .rows import alike, as_index, rearranged
from .slots import enlarged, most_room
from .untrusted import whole

Filled = tuple[list[int], int, Tensor]
"""`(rows, begin, keys)`: the pages that rows which are alike have now filled, from `begin` on: [rows, K, tokens, D]."""


class Pages:
    """Pages on the device that computes: [B, K, capacity, D], each row filled from the left.

    `TieredPages` has the same methods and keeps most of them elsewhere.

    Args:
        page: tokens a page, a power of two.
    """

    apart = False  # whether most pages may lie elsewhere
    lossless = True  # whether every page is what came

    def __init__(self, page: int) -> None:
        self.page = page
        self.lengths: list[int] = []  # tokens of each row
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._still = 0  # pages that there was room for when it last had to stand still

    def allow(self, pages: list[int]) -> None:
        """So many full pages of each row may be on the device: here all are."""

    def append(self, keys: Tensor, values: Tensor, skip: list[int]) -> Iterator[Filled]:
        """Store new tokens [B, K, T, D], of each row but the first `skip[row]`.

        Yields:
            What they fill, once it is stored.
        """
        if self.keys is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (keys, values))
        most = max(n + keys.shape[2] - s for n, s in zip(self.lengths, skip, strict=True))
        self._reserve(most)
        for rows in alike(zip(self.lengths, skip, strict=True)):
            length, first = self.lengths[rows[0]], skip[rows[0]]
            end = length + keys.shape[2] - first
            which = as_index(rows, len(self.lengths), self.keys.device)
            for own, new in ((self.keys, keys), (self.values, values)):
                own[which, :, length:end] = new[which, :, first:]
            for row in rows:
                self.lengths[row] = end
            begin, full = length // self.page, end // self.page
            if full > begin:
                yield rows, begin, self.keys[which, :, begin * self.page : full * self.page]

    @property
    def room(self) -> int:
        """Pages that are reserved."""
        return self.keys.shape[2] // self.page

    @property
    def num_heads(self) -> int:
        return self.keys.shape[1]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, K, tokens, D], as views."""
        most = max(self.lengths)
        return self.keys[:, :, :most], self.values[:, :, :most]

    def look(self) -> tuple[Tensor, Tensor]:
        """The same for who only measures."""
        return self.whole()

    def close(self) -> Iterable[Filled]:
        """Pages that single tokens have filled since `append`, which yields them at once."""
        return ()

    def stand_still(self, pages: int) -> None:
        """Have room for so many pages and more: nothing moves while they fit."""
        if pages > self._still:
            self._reserve((pages + spare(pages)) * self.page)
            self._still = self.room

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a step reads and writes that stands still."""
        return self.keys, self.values

    def put(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        """Write a token [B, K, 1, D] of every row, of `length` [B] with it; counts nothing."""
        row, place = torch.arange(len(length), device=length.device), length - 1
        for own, new in ((self.keys, keys), (self.values, values)):
            own[row, :, place] = new[:, :, 0]  # by index, as in `TieredPages.put`

    def page_of(self, newest: Tensor) -> Tensor:
        """Keys [B, K, page, D] of one page of every row, whose numbers are [B, 1, 1]."""
        row = torch.arange(len(newest), device=newest.device)
        return self.keys.unflatten(2, (-1, self.page))[row, :, newest.flatten()]

    def filled(self, tokens: int) -> None:
        """Count what `put` has written to every row."""
        self.lengths = [n + tokens for n in self.lengths]

    def bring(self, pages: Tensor, newest: Tensor) -> Tensor:
        """The slots of `fetch`."""
        return pages.int()

    def fetch(self, pages: Tensor, newest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(keys, values, slots)`: where `sparse_decode` finds the pages [B, K, M], -1 for none; their newest page is
        the one that tokens are being added to."""
        return self.keys, self.values, self.bring(pages, newest)

    def cut(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its new length on."""
        self.lengths = lengths

    def select_rows(self, rows: list[int]) -> None:
        self.lengths = [self.lengths[r] for r in rows]
        if self.keys is not None:
            self.keys, self.values = (rearranged(x, rows) for x in (self.keys, self.values))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All tokens, and what `load` takes beside them."""
        capacity = min(self.keys.shape[2], most_room(max(self.lengths), 2 * self.page))  # less after a crop
        return dict(zip(("keys", "values"), self.whole(), strict=True)), {"capacity": capacity}

    def load(self, keys: Tensor, values: Tensor, lengths: list[int], numbers: dict[str, Any]) -> None:
        """Hold the tokens [B, K, T, D] of rows that are filled from the left."""
        most = max(lengths)
        capacity = whole(numbers, "capacity", most_room(most, 2 * self.page)) // self.page * self.page
        self.lengths, self.keys, self.values = lengths, keys[:, :, :0], values[:, :, :0]
        self._reserve(most, capacity)
        for own, x in ((self.keys, keys), (self.values, values)):
            own[:, :, :most] = x

    def nbytes(self) -> dict[str, int]:
        """Bytes per tier."""
        return {
            "device": 0 if self.keys is None else sum(x.untyped_storage().nbytes() for x in (self.keys, self.values))
        }

    def _reserve(self, tokens: int, capacity: int = 0) -> None:
        held = self.keys.shape[2]
        if tokens <= held:
            return
        capacity = -(-max(tokens, capacity, enlarged(held)) // self.page) * self.page
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :held] = old
            setattr(self, name, new)


def spare(pages: int) -> int:
    """How many pages to have room for beside so many: each time that they are used up, what was compiled is again."""
    return max(pages // 4, GRAIN)


def by_group(data: Tensor, page: int) -> Tensor:
    """[B, K, 2, pages * page, D] as [B * K, 2, pages, page, D], a view."""
    return data.flatten(0, 1).unflatten(2, (-1, page))
