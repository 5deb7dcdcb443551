"""The cache, in transformers' form, that a model is run through in chunks: it hands the layers what `buffers` keeps."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lcpatch_kernels import BlockSparseSpec
from lcpatch_kernels.block_sparse import choose

from ..core.errors import UnsupportedModelError
from ..hf.watch import Call, attend
from .buffers import Attend, Now, Pair, Split, Store, Unit, Unread
from .pieces import AttendInPieces, fits


class KeysReadElsewhere(UnsupportedModelError):
    """A layer does more than attend to the keys and values that its cache returns, or less: ours would differ."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; our attention would not compute what this model does: use attention='own'")


class StandIn(Tensor):
    """All tokens' keys or values for a layer that attends: their shape alone, as `ChunkLayer.attend` has the numbers.

    A model that computes with them, between its cache and its attention or beside it, is stopped: it would be given
    numbers that mean nothing.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        raise KeysReadElsewhere(f"a layer computes ({func.__name__}) with keys or values that its cache returned")


SHAPE = (Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.size, Tensor.dim)


class ChunkLayer(CacheLayerMixin):
    """One layer of a `ChunkCache`: it says it holds the tokens before the chunk at hand.

    Args:
        index: the layer's number.
        store: where keys, values and gradients lie.
        now: what is being run.
        attending: attention asks this layer (see `hf.watch`), and it goes through our op. That one is bottom-right
            causal: it needs no mask of a chunk against its prefix, repeats no KV head, and can take a few at a time.
        plain: one unpadded document a row, so that causality is all there is to say.
        pieces: dense attention goes through cuDNN, in parts.
        casts: our op attends to what comes out, so under autocast keys are kept as it casts them.
    """

    def __init__(
        self, index: int, store: Store, now: Now, attending: bool, plain: bool, pieces: bool, casts: bool
    ) -> None:
        super().__init__()
        self.index, self.store, self.now = index, store, now
        self.attending, self.plain, self.pieces, self.casts = attending, plain, pieces, casts
        self.expected = False
        self.num_calls = 0
        self.last = False
        self._own: Pair | None = None
        self._told: Pair | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """The chunk's keys and values [B, K, C, D] in, those of all tokens up to its end out, [B, K, end, D].

        For a layer that attends what comes out has only the shape (see `StandIn`).
        """
        now, new = self.now, (key_states, value_states)
        if key_states.shape[2] != now.end - now.start:
            raise UnsupportedModelError(
                f"layer {self.index} gave its cache {key_states.shape[2]} tokens of a chunk of {now.end - now.start}: "
                "chunkwise backward needs one key and value per token"
            )
        self.num_calls += 1
        if not now.backward:
            now.ahead -= 1
            self.last = now.ahead == 0
        if not self.is_initialized:
            self.lazy_initialization(*new)
        if self.attending:
            if not self.expected:
                raise KeysReadElsewhere(f"layer {self.index} does not ask its cache to attend")
            self._own, self.expected = new, False
            self._told = tuple(x.detach()[:, :, :1].expand(-1, -1, now.end, -1).as_subclass(StandIn) for x in new)
            return self._told
        new = _as_the_op_casts(*new) if self.casts else new
        unit = (self.index, 0)
        self._keep(unit, new)
        return Split.apply(*new, self.store, unit, now)

    def get_seq_length(self) -> int:
        return self.now.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.now.start + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def wants_dense(self, query: Tensor) -> bool:
        """Whether to attend also where no pattern governs."""
        return self.attending

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention over all tokens up to the chunk's end, KV heads by units."""
        if not self.attending:  # its keys are all in the call
            return attend(call)
        told, self._told = self._told, None
        if told is None or call.key is not told[0] or call.value is not told[1]:
            raise KeysReadElsewhere(f"layer {self.index} attends to other keys or values than its cache returned")
        (query, keys, values), self._own = _as_the_op_casts(call.query, *self._own), None
        if self.plain:
            call = call._replace(bounds=None)
        num_kv_heads, num_heads = keys.shape[1], query.shape[1]
        units = self.store.num_units(num_kv_heads)
        parts = []
        for n in range(units):
            kv, q = (slice(n * h // units, (n + 1) * h // units) for h in (num_kv_heads, num_heads))
            some = call if units == 1 else call._replace(spec=_some_heads(call.spec, q.start, q.stop))
            parts.append(self._attend(n, query[:, q], (keys[:, kv], values[:, kv]), some))
        return parts[0] if units == 1 else tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))

    def _attend(self, part: int, query: Tensor, new: Pair, call: Call) -> tuple[Tensor, Tensor]:
        now, unit = self.now, (self.index, part)
        self._keep(unit, new)
        if self.last and not now.read:  # what it returns becomes no one's keys or values, and no loss
            return Unread.apply(query, *new, self.store, unit, now)
        if self.pieces and fits(call):
            return AttendInPieces.apply(query, *new, call, self.store, unit, now)
        if choose(call.impl, query, call.spec) in ("triton", "reference"):
            return Attend.apply(query, *new, call, self.store, unit, now)
        keys, values = Split.apply(*new, self.store, unit, now)
        return attend(call._replace(query=query, key=keys, value=values))

    def _keep(self, unit: Unit, new: Pair) -> None:
        now = self.now
        if now.new and not now.backward:
            self.store.write(unit, tuple(x.detach() for x in new), now.start)


class ChunkCache(Cache):
    """The cache of one sequence that is run in chunks.

    Args:
        num_layers: layers of the model.
        store: where keys, values and gradients lie.
        attending: the layers that attend by themselves (see `ChunkLayer`).
        size: tokens of a chunk.
        plain: one unpadded document a row.
        pieces: dense attention goes through cuDNN, in parts.
        casts: all layers' attention is ours, though it does not ask the cache.
    """

    def __init__(
        self,
        num_layers: int,
        store: Store,
        attending: Collection[int],
        *,
        size: int,
        plain: bool,
        pieces: bool,
        casts: bool = False,
    ) -> None:
        self.now, self.store, self.attends = Now(size=size), store, bool(attending)
        layers = [ChunkLayer(n, store, self.now, n in attending, plain, pieces, casts) for n in range(num_layers)]
        super().__init__(layers=layers)

    def set(self, start: int, end: int, *, new: bool, read: bool, hop: float = 1.0) -> None:
        """Before a forward of tokens [start, end), and its backward; the rest as `Now` has it."""
        now = self.now
        now.start, now.end, now.new, now.read, now.hop = start, end, new, read, hop
        now.backward, now.ahead = False, len(self.layers)
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


def _as_the_op_casts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast our op computes in its dtype, so that is what is kept too."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


@lru_cache(maxsize=256)
def _some_heads(spec: BlockSparseSpec, first: int, end: int) -> BlockSparseSpec:
    return BlockSparseSpec.of([spec.rules[n] for n in spec.head_rules[first:end]], spec.block_size)
