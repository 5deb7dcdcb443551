"""Checks of what a file says about a layer, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 40


def whole(numbers: Mapping[str, Any], name: str, most: int = MOST) -> int:
    """The integer `name`, from 0 to `most`.

    Raises:
        ValueError: missing, or anything else.
    """
    value = numbers.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name}={value!r} must be an integer from 0 to {most}")
    return value


def wholes(numbers: Mapping[str, Any], name: str, rows: int | None = None, most: int = MOST) -> list[int]:
    """The integers `name`, one a row.

    Raises:
        ValueError: missing, another number of them, or anything else.
    """
    values = numbers.get(name)
    if not isinstance(values, list) or not values or (rows is not None and len(values) != rows):
        raise ValueError(f"{name} must hold an integer for each of {rows or 'some'} rows")
    return [whole({name: value}, name, most) for value in values]


def size(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    """How large the tensor `name` is in dimension `dim`.

    Raises:
        ValueError: missing, or of fewer dimensions.
    """
    if name not in tensors or tensors[name].dim() <= dim:
        raise ValueError(f"{name} must be a tensor of more than {dim} dimensions")
    return tensors[name].shape[dim]


def fitting(
    tensors: Mapping[str, Tensor], likes: Mapping[str, Tensor], rows: int, slots: int | None
) -> dict[str, Tensor]:
    """Copies of `tensors`, on the devices of `likes`.

    Args:
        likes: what they must be like, by name: dtype, heads, and all sizes from the fourth dimension on.
        rows: their first size.
        slots: their third size; None: alike, whatever it is.

    Raises:
        ValueError: a missing or unknown tensor, or one of another dtype or shape.
    """
    if tensors.keys() != likes.keys():
        raise ValueError(f"tensors {sorted(tensors)} where {sorted(likes)} are wanted")
    found = {}
    for name, like in likes.items():
        x = tensors[name]
        slots = x.shape[2] if slots is None and x.dim() > 2 else slots
        shape = (rows, like.shape[1], slots, *like.shape[3:])
        if tuple(x.shape) != shape or x.dtype != like.dtype:
            raise ValueError(f"{name} is {list(x.shape)} in {x.dtype}, where {list(shape)} in {like.dtype} is wanted")
        found[name] = torch.empty_like(x, device=like.device).copy_(x)
    return found
