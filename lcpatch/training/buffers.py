"""The cache that chunkwise backpropagation runs through: every chunk's keys and values, and their gradients, in place.

A layer's keys and values of the whole sequence lie in two static buffers, their gradients in two more. A chunk that is
run with gradients attends to views of the first two; one autograd node per layer, between the chunk's own keys and
what attention reads, splits the gradient that comes back: the prefix's part is added to the gradient buffers, the
chunk's own part goes on into the chunk's graph, together with what later chunks left for it there. So nothing grows
with the length but these four buffers: 2 kappa bytes a token, kappa being what a KV cache holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..core.errors import UnsupportedModelError
from ..hf.watch import Call, attend

Pair = tuple[Tensor, Tensor]
"""What a layer has of keys and of values, each [B, K, T, D]."""


@dataclass
class Now:
    """What is being run, for all layers of a cache.

    Args:
        start, end: the chunk's tokens.
        recording: the first pass, which fills the buffers. In the second pass layers may run several times (gradient
            checkpointing) and change nothing but gradients.
        hop: factor of the gradient that later chunks left for this one.
    """

    start: int = 0
    end: int = 0
    recording: bool = True
    hop: float = 1.0


class DeviceStore:
    """Keys, values and their gradients on the device that computes them, one contiguous buffer each.

    Args:
        num_layers: layers of the model.
        length: tokens of the sequence.
    """

    def __init__(self, num_layers: int, length: int) -> None:
        self.length = length
        self._kept: list[Pair | None] = [None] * num_layers
        self._grads: list[Pair | None] = [None] * num_layers

    def write(self, layer: int, new: Pair, start: int) -> None:
        """Keep a chunk's keys and values."""
        if self._kept[layer] is None:
            self._kept[layer] = self._like(new, torch.empty)
        for buffer, part in zip(self._kept[layer], new, strict=True):
            buffer[:, :, start : start + part.shape[2]] = part

    def read(self, layer: int, end: int) -> Pair:
        """The first `end` tokens' keys and values, as views."""
        keys, values = self._kept[layer]
        return keys[:, :, :end], values[:, :, :end]

    def collect(self, layer: int, grads: Pair, start: int, end: int, hop: float) -> Pair:
        """Keep the prefix's part of the gradients of `read`'s result; return the chunk's, with what was kept for it."""
        if self._grads[layer] is None:
            self._grads[layer] = self._like(grads, torch.zeros)
        for buffer, grad in zip(self._grads[layer], grads, strict=True):
            buffer[:, :, :start] += grad[:, :, :start]
        own = (
            torch.add(grad[:, :, start:end], buffer[:, :, start:end], alpha=hop)
            for buffer, grad in zip(self._grads[layer], grads, strict=True)
        )
        return tuple(own)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a chunk's forward with gradients: nothing that attention saves needs attention here."""
        yield

    def memory(self) -> dict[str, int]:
        """Bytes held, by tier."""
        held = [x for pair in (*self._kept, *self._grads) if pair is not None for x in pair]
        return {"device": sum(x.untyped_storage().nbytes() for x in held)}

    def _like(self, pair: Pair, new: Any) -> Pair:
        keys, values = (new((*x.shape[:2], self.length, x.shape[3]), dtype=x.dtype, device=x.device) for x in pair)
        return keys, values


class _Split(torch.autograd.Function):
    """A chunk's keys and values in; all tokens' out. Backward gives the prefix its share and passes on the chunk's."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, store: Any, layer: int, now: Now) -> Pair:
        ctx.where = (store, layer, now.start, now.end, now.hop)
        return store.read(layer, now.end)

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Any, ...]:
        store, layer, start, end, hop = ctx.where
        with exact_gradients(grad_keys.device.type):
            keys, values = store.collect(layer, (grad_keys, grad_values), start, end, hop)
        return keys, values, None, None, None


class ChunkLayer(CacheLayerMixin):
    """One layer of a `ChunkCache`, in transformers' form: it says it holds the tokens before the chunk at hand."""

    expected = False  # of `hf.watch`: nothing to announce, every token is here

    def __init__(self, index: int, store: Any, now: Now, attending: bool, plain: bool) -> None:
        super().__init__()
        self.index, self.store, self.now = index, store, now
        self.attending, self.plain = attending, plain
        self.num_calls = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """The chunk's keys and values [B, K, C, D] in, those of all tokens up to its end out, [B, K, end, D]."""
        now = self.now
        if key_states.shape[2] != now.end - now.start:
            raise UnsupportedModelError(
                f"layer {self.index} gave its cache {key_states.shape[2]} tokens of a chunk of {now.end - now.start}: "
                "chunkwise backward needs one key and value per token"
            )
        self.num_calls += 1
        if now.recording:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.store.write(self.index, (key_states, value_states), now.start)
            return self.store.read(self.index, now.end)
        return _Split.apply(key_states, value_states, self.store, self.index, now)

    def get_seq_length(self) -> int:
        return self.now.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.now.start + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def wants_dense(self, query: Tensor) -> bool:
        """Our op is bottom-right causal: it needs no mask of a chunk against its prefix, and repeats no KV head."""
        return self.attending

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """As for any layer that keeps every token in order."""
        return attend(call._replace(bounds=None) if self.plain else call)


class ChunkCache(Cache):
    """The cache of one sequence that is run in chunks.

    Args:
        num_layers: layers of the model.
        store: where keys, values and gradients lie.
        attending: layers whose attention goes through our op even where no pattern governs it (see `hf.watch`).
        plain: one unpadded document a row, so that causality is all there is to say.
    """

    def __init__(self, num_layers: int, store: Any, attending: Collection[int], plain: bool) -> None:
        self.now, self.store, self.attends = Now(), store, bool(attending)
        super().__init__(layers=[ChunkLayer(n, store, self.now, n in attending, plain) for n in range(num_layers)])

    def set(self, start: int, end: int, recording: bool, hop: float = 1.0) -> None:
        """Before a forward of tokens [start, end) and its backward."""
        now = self.now
        now.start, now.end, now.recording, now.hop = start, end, recording, hop
        for layer in self.layers:
            layer.num_calls = 0

    def check(self) -> None:
        """After a forward: every layer must have taken its keys from here, or its gradient would be another one's.

        Raises:
            UnsupportedModelError: a layer that did not, or did so twice.
        """
        for layer in self.layers:
            if layer.num_calls != 1:
                raise UnsupportedModelError(
                    f"layer {layer.index} of {len(self.layers)} went through the cache {layer.num_calls} times in a "
                    "forward, not once: chunkwise backward needs a decoder of transformers whose every layer is causal "
                    "self-attention with keys and values of its own; use loss.backward() for this model"
                )


def exact_gradients(device_type: str) -> Any:
    """Around a backward inside autocast: gradients are computed in the precision that their tensors have."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
