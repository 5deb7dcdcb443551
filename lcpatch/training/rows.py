"""Rows of a fixed length, packed from documents that do not see each other.

A row says where its documents begin by position_ids that start anew at 0, which is what lcpatch's attention (and
transformers' own) goes by. The first token of a document is nobody's target: label -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .tokens import TokenStore

IGNORE = -100
OPEN_ROWS = 64
"""Rows that first-fit looks into."""


class TextRows(Dataset):
    """Running text, cut every `length` tokens; what is left at the end is less than a row and is left out.

    A document that is longer than a row goes on in the next one, where it starts anew.

    Args:
        store: the documents.
        length: tokens of a row.
        masked: whether documents are kept apart; else each row is one text, with an end-of-text token between.

    Raises:
        ValueError: less than one row, or a row without anything to predict.
    """

    def __init__(self, store: TokenStore, length: int, masked: bool = True) -> None:
        self._store, self._length, self._masked = store, length, masked
        self.key = store.key
        if length < 2:
            raise ValueError(f"length={length} must be at least 2 tokens")
        if len(store) < length:
            raise ValueError(
                f"the data has {len(store)} tokens, and a row {length}: give more data, or a shorter --length"
            )

    def __len__(self) -> int:
        return len(self._store) // self._length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        start = range(0, len(self) * self._length, self._length)[number]
        tokens = self._store.tokens(start, start + self._length)
        ends = self._store.ends
        inside = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, start + self._length)] - start
        return _row(tokens, np.ones(self._length, bool), inside, self._masked)


class ChatRows(Dataset):
    """Whole conversations, packed first-fit; none is cut. The end of a row is padding that no one sees.

    Args:
        store: the conversations, none longer than `length`.
        length: tokens of a row.
        pad: the token to pad with.
        packs: whether conversations may share a row; else each has one.

    Raises:
        ValueError: no conversation is left.
    """

    def __init__(self, store: TokenStore, length: int, pad: int, packs: bool = True) -> None:
        self._store, self._length, self._pad = store, length, pad
        self.key = store.key
        self._starts = np.concatenate([[0], store.ends])
        if not len(store.ends):
            raise ValueError(
                f"none of {store.index['records']} records has an answer and at most {length} tokens: give a longer "
                "--length, or other data"
            )
        sizes = np.diff(self._starts)
        self._rows = first_fit(sizes, length) if packs else [[number] for number in range(len(sizes))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        spans = [(int(self._starts[n]), int(self._starts[n + 1])) for n in self._rows[number]]
        sizes = [stop - start for start, stop in spans]
        empty = self._length - sum(sizes)
        pads = np.full(empty, self._pad, np.int32)
        tokens = np.concatenate([*(self._store.tokens(*span) for span in spans), pads])
        learn = np.concatenate([*(self._store.learn(*span) for span in spans), np.zeros(empty, bool)])
        inside = np.cumsum(sizes)
        return _row(tokens, learn, inside[inside < self._length], True)


def first_fit(sizes: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
    """Which documents share a row: each goes into the first of the last `OPEN_ROWS` rows that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number, size in enumerate(map(int, sizes)):
        first = max(0, len(rows) - OPEN_ROWS)
        place = next((row for row in range(first, len(rows)) if room[row] >= size), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= size
    return rows


def split(rows: Dataset, held_out: int) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and the last `held_out` ones to evaluate on (None for 0).

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = len(rows)  # type: ignore[arg-type]
    if not held_out:
        return rows, None
    if held_out >= count:
        raise ValueError(
            f"the data makes {count} rows, and {held_out} of them are to be evaluated on: give more data, a shorter "
            "--length, or --eval-rows 0"
        )
    return Subset(rows, range(count - held_out)), Subset(rows, range(count - held_out, count))


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch [B, length] of rows."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(tokens: np.ndarray, learn: np.ndarray, starts: np.ndarray, masked: bool) -> dict[str, Any]:
    """Model inputs; a document begins at 0 and at each of `starts`."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    labels = ids.masked_fill(~torch.from_numpy(learn), IGNORE)
    labels[0] = IGNORE
    if not masked:
        return {"input_ids": ids, "labels": labels}
    begins = np.concatenate([[0], starts]).astype(np.int64)
    sizes = np.diff(np.concatenate([begins, [len(tokens)]]))
    positions = torch.from_numpy(np.arange(len(tokens)) - np.repeat(begins, sizes))
    labels[torch.from_numpy(begins)] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
