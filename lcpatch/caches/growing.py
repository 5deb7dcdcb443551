"""Layers that keep every token in order, in buffers that grow."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..hf.watch import Call, attend
from .layer import decode, negative
from .slots import GRAIN, enlarged, most_room
from .untrusted import fitting, size, whole


class GrowingLayer(DynamicLayer):
    """All tokens in order, in a buffer that grows geometrically: appending a token moves one token, not all of them.

    `keys` and `values` are views of what is filled.
    """

    def __init__(self) -> None:
        super().__init__()
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
        self.length = max(self.length + negative(tokens_to_remove), 0)
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

    def kept_of_rows(self) -> list[tuple[int, int]]:
        """`(kept, seen)` of each row: all, pads too."""
        return [(self.length, self.length)] * (len(self._buffers[0]) if self.is_initialized else 0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        capacity = min(self._buffers[0].shape[2], most_room(self.length))  # less after a crop
        return {"keys": self.keys, "values": self.values}, {"capacity": capacity}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of such a layer gave; `like` is an empty tensor [1, K, 0, D] as the model's keys.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        found = fitting(tensors, {"keys": like, "values": like}, size(tensors, "keys", 0), None)
        self.length = found["keys"].shape[2]
        capacity = max(whole(numbers, "capacity", most_room(self.length)), self.length)
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self._buffers = tuple(_grown(found[name], capacity, self.length) for name in ("keys", "values"))
        self._show()

    def _map(self, change: Any) -> None:
        if self.is_initialized:
            self._buffers = tuple(change(x) for x in self._buffers)
            self._show()

    def _grow(self, needed: int) -> None:
        capacity = -(-max(needed, enlarged(self.length)) // GRAIN) * GRAIN
        self._buffers = tuple(_grown(x, capacity, self.length) for x in self._buffers)

    def _show(self) -> None:
        if self.is_initialized:
            self.keys, self.values = (x[:, :, : self.length] for x in self._buffers)


class DenseLayer(GrowingLayer):
    """All tokens, decoded on a GPU by our split-K kernel instead of the model's dense implementation.

    transformers' SDPA does not read a long cache at the memory's speed there (kernels/results, decode of a model).
    """

    expected = False

    def can_trace(self, num: int) -> bool:
        return True

    def wants_dense(self, query: Tensor) -> bool:
        return query.shape[2] == 1 and query.is_cuda

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.query.shape[2] > 1:
            return attend(call)
        bounds = None if call.bounds is None else call.bounds[:, 0, 2:]
        return decode(call, call.key, call.value, spec=call.spec, bounds=bounds)


def _grown(x: Tensor, capacity: int, filled: int) -> Tensor:
    """A buffer of `capacity` tokens with x's first `filled` ones."""
    new = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    new[:, :, :filled] = x[:, :, :filled]
    return new
