"""Rows of a batch, and the tables that have one entry for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def alike(states: Iterable[object]) -> list[list[int]]:
    """Rows grouped by their state: without padding, one group."""
    groups: dict[object, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(state, []).append(row)
    return list(groups.values())


def as_index(rows: list[int], num_rows: int, device: torch.device) -> Tensor | slice:
    """`rows`, in order, of `num_rows` as an index of tensors there.

    All of them as a slice, which copies nothing and does not wait for the device; some as a tensor, for a list would be
    copied anew, and waited for, wherever it is used.
    """
    return slice(None) if len(rows) == num_rows else torch.tensor(rows, device=device)


def rearranged(x: Tensor, rows: Tensor | list[int]) -> Tensor:
    """x[rows]; where that is as large, as with beams, in the same place, whose address a graph may know."""
    new = x[rows]
    return x.copy_(new) if new.shape == x.shape else new


def to_list(indices: Tensor) -> list[int]:
    """Host copy of a small index tensor; reading it back waits for the device."""
    return torch.as_tensor(indices).tolist()
