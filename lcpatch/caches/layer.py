"""What every cache is made of: a container that the attention asks, and layers that hold keys and values.

A layer whose storage is not simply every token in order also attends: `hf.attention` hands it the queries and the
pattern (`attend`), and it answers with the output and the LSE. It is never asked what it keeps, and no one else indexes
into it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lcpatch_kernels import sparse_decode

from ..core.registry import Registry
from ..hf.watch import Call, attend

caches: Registry[type[LongCache]] = Registry("cache", package="lcpatch.caches")

GROWTH = 1.5  # of a full buffer: amortised copying stays below two moves a token, waste below a third
GRAIN = 256  # capacities are multiples of this many tokens


class GrowingLayer(DynamicLayer):
    """All tokens in order, in a buffer that grows geometrically: appending a token moves one token, not all of them.

    `capacity` tokens are reserved at first use; `keys` and `values` are views of what is filled.
    """

    def __init__(self, capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = tuple(x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, D] and return everything so far, [B, K, length + T, D], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._grow(end)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding in transformers 5.17 hands over a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give a negative number, how many tokens to remove from the end"
            )
        self.length = max(self.length + tokens_to_remove, 0)
        self._show()

    def reset(self) -> None:
        self.length, self._buffers = 0, None
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def memory(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(x.untyped_storage().nbytes() for x in self._buffers or ())

    def _map(self, change: Any) -> None:
        if self.is_initialized:
            self._buffers = tuple(change(x) for x in self._buffers)
            self._show()

    def _grow(self, needed: int) -> None:
        capacity = max(needed, self.capacity, int(self.length * GROWTH))
        capacity = -(-capacity // GRAIN) * GRAIN
        self._buffers = tuple(_grown(x, capacity, self.length) for x in self._buffers)

    def _show(self) -> None:
        if self.is_initialized:
            self.keys, self.values = (x[:, :, : self.length] for x in self._buffers)


class DenseLayer(GrowingLayer):
    """All tokens, decoded on a GPU by our split-K kernel instead of the model's dense implementation.

    transformers' SDPA does not read a long cache at the memory's speed there (kernels/results, decode of a model).
    """

    expected = False

    def wants_dense(self, query: Tensor) -> bool:
        return query.shape[2] == 1 and query.is_cuda

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.query.shape[2] > 1:
            return attend(call)
        bounds = None if call.bounds is None else call.bounds[:, 0, 2:]
        return decode(call, call.key, call.value, spec=call.spec, bounds=bounds)


class LongCache(Cache):
    """Base of lcpatch's caches: a container whose layers may attend by themselves."""

    name: ClassVar[str]
    attends = True

    def memory(self) -> dict[str, int]:
        """Bytes held per tier (so far: the device's memory)."""
        return {"device": sum(layer.memory() for layer in self.layers if hasattr(layer, "memory"))}


def decode(call: Call, keys: Tensor, values: Tensor, **which: Any) -> tuple[Tensor, Tensor]:
    """`sparse_decode` of the call's queries over `keys` and `values`; `which` says over which of them."""
    impl = call.impl if call.impl in ("triton", "reference") else "auto"
    return sparse_decode(call.query, keys, values, scale=call.scale, softcap=call.softcap, impl=impl, **which)


def _grown(x: Tensor, capacity: int, filled: int) -> Tensor:
    """A buffer of `capacity` tokens with x's first `filled` ones."""
    new = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    new[:, :, :filled] = x[:, :, :filled]
    return new


def to_list(indices: Tensor) -> list[int]:
    """Host copy of a small index tensor; reading it back waits for the device."""
    return torch.as_tensor(indices).tolist()
