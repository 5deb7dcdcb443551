"""Keys and values of a chunked sequence, and their gradients, in place.

They lie in static buffers. A chunk that is run with gradients attends to all tokens before it; one autograd node per
layer, between the chunk's own keys and what attention reads, splits the gradient that comes back: the prefix's part is
added to the gradient buffers, the chunk's own part goes on into the chunk's graph, together with what later chunks left
for it there. So nothing grows with the length but four buffers: 2 kappa bytes a token, kappa being what a KV cache
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lcpatch_kernels import block_sparse_backward

from ..hf.watch import Call, attend

Pair = tuple[Tensor, Tensor]
"""What there is of keys and of values, each [B, K, T, D]."""
Unit = tuple[int, int]
"""A layer, and which part of its KV heads."""


@dataclass
class Now:
    """What is being run, for all layers of a model.

    Args:
        start, end: the chunk's tokens.
        size: tokens of every chunk but the last.
        new: the chunk's keys and values are not in the buffers yet: this forward puts them there. In another layers
            may run several times (gradient checkpointing) and change nothing but gradients.
        backward: a chunk's backward has begun.
        hop: factor of the gradient that later chunks left for this one.
        read: whether anyone reads the chunk's hidden states: in the second pass, if it has a label.
        ahead: layers whose keys and values this forward has not come to yet.
    """

    start: int = 0
    end: int = 0
    size: int = 0
    new: bool = True
    backward: bool = False
    hop: float = 1.0
    read: bool = True
    ahead: int = 0


class Store(Protocol):
    """Keys, values and gradients of all layers. A layer's KV heads may be split into units that are held alone."""

    def num_units(self, num_kv_heads: int) -> int:
        """Units of a layer whose attention can take its KV heads a few at a time."""

    def write(self, unit: Unit, new: Pair, start: int) -> None:
        """Keep a chunk's keys and values, from token `start` on."""

    def read(self, unit: Unit, now: Now) -> Pair:
        """All tokens' keys and values up to the chunk's end. Good until two more units were read."""

    def add(self, unit: Unit, grads: Pair, start: int, end: int) -> None:
        """Add to the gradients of tokens [start, end), whole chunks before the one at hand."""

    def take(self, unit: Unit, grads: Pair, now: Now) -> Pair:
        """The chunk's own gradients, with what later chunks left for it times `now.hop`."""

    def skip(self, num_chunks: int) -> None:
        """After the first chunk: as if as many more had been kept, whatever in them (see `chunkwise.rehearse`)."""

    def memory(self) -> dict[str, int]:
        """Bytes held, by tier."""

    def close(self) -> None:
        """Nothing of it will be used again."""


class DeviceStore:
    """A `Store` on the device that computes: one contiguous buffer each.

    Args:
        length: tokens of the sequence.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._kept: dict[Unit, Pair] = {}
        self._grads: dict[Unit, Pair] = {}

    def num_units(self, num_kv_heads: int) -> int:
        return 1

    def write(self, unit: Unit, new: Pair, start: int) -> None:
        if unit not in self._kept:
            self._kept[unit] = self._like(new, torch.empty)
        for buffer, part in zip(self._kept[unit], new, strict=True):
            buffer[:, :, start : start + part.shape[2]] = part

    def read(self, unit: Unit, now: Now) -> Pair:
        keys, values = self._kept[unit]
        return keys[:, :, : now.end], values[:, :, : now.end]

    def add(self, unit: Unit, grads: Pair, start: int, end: int) -> None:
        if unit not in self._grads:
            self._grads[unit] = self._like(grads, torch.zeros)
        for buffer, grad in zip(self._grads[unit], grads, strict=True):
            buffer[:, :, start:end] += grad

    def take(self, unit: Unit, grads: Pair, now: Now) -> Pair:
        if unit not in self._grads:
            return grads
        left = (buffer[:, :, now.start : now.end] for buffer in self._grads[unit])
        keys, values = (torch.add(grad, x, alpha=now.hop) for grad, x in zip(grads, left, strict=True))
        return keys, values

    def skip(self, num_chunks: int) -> None:
        pass  # the buffers are as long as the text from the start

    def memory(self) -> dict[str, int]:
        held = [x for pair in (*self._kept.values(), *self._grads.values()) for x in pair]
        return {"device": sum(x.untyped_storage().nbytes() for x in held)}

    def close(self) -> None:
        self._kept.clear()
        self._grads.clear()

    def _like(self, pair: Pair, new: Any) -> Pair:
        keys, values = (new((*x.shape[:2], self.length, x.shape[3]), dtype=x.dtype, device=x.device) for x in pair)
        return keys, values


class Split(torch.autograd.Function):
    """A chunk's keys and values in; all tokens' out, for whatever attention the model has.

    Backward gives the prefix its share, and the chunk its own.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, store: Store, unit: Unit, now: Now) -> Pair:
        ctx.where = (store, unit, now)
        return store.read(unit, now)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        store, unit, now = ctx.where
        with exact_gradients(grads[0].device.type):
            return *split(store, unit, grads, now), None, None, None


class Attend(torch.autograd.Function):
    """A chunk's queries, keys and values in; our attention over all tokens out, and its LSE.

    Saves nothing that is as long as the text: backward reads keys and values from the store again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, call: Call, store: Store, unit: Unit, now: Now
    ) -> tuple[Tensor, Tensor]:
        key, value = store.read(unit, now)
        call = call._replace(query=query, key=key, value=value)
        out, lse = attend(call)
        ctx.save_for_backward(query, out, lse)
        ctx.where = (call._replace(query=None, key=None, value=None), store, unit, now)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        call, store, unit, now = ctx.where
        query, out, lse = ctx.saved_tensors
        with exact_gradients(query.device.type):
            grad_query, *grads = block_sparse_backward(
                grad_out,
                grad_lse,
                query,
                *store.read(unit, now),
                out,
                lse,
                call.spec,
                bounds=call.bounds,
                scale=call.scale,
                softcap=call.softcap,
                impl=call.impl,
            )
            return grad_query, *split(store, unit, grads, now), None, None, None, None


class Unread(torch.autograd.Function):
    """A chunk's queries, keys and values in; zeros out in place of their attention, whose gradient is zero then too.

    Backward still gives the keys and values what later chunks left for them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, store: Store, unit: Unit, now: Now
    ) -> tuple[Tensor, Tensor]:
        ctx.where = (store, unit, now)
        ctx.save_for_backward(query, keys, values)
        lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        return query.new_zeros(*query.shape[:3], values.shape[3]), lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        store, unit, now = ctx.where
        grad_query, *grads = (torch.zeros_like(x) for x in ctx.saved_tensors)
        return grad_query, *store.take(unit, tuple(grads), now), None, None, None


def split(store: Store, unit: Unit, grads: Sequence[Tensor], now: Now) -> Pair:
    """Give the prefix its share of the gradients of all keys and values up to the chunk's end; return the chunk's."""
    if now.start:
        store.add(unit, tuple(x[:, :, : now.start] for x in grads), 0, now.start)
    return store.take(unit, tuple(x[:, :, now.start :] for x in grads), now)


def exact_gradients(device_type: str) -> Any:
    """Around a backward inside autocast: gradients are computed in the precision that their tensors have."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
