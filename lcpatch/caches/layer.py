"""What every cache is made of: a container that the attention asks, and layers that hold keys and values.

A layer whose storage is not simply every token in order also attends: `hf.attention` hands it the queries and the
pattern (`attend`), and it answers with the output and the LSE. It is never asked what it keeps, and no one else indexes
into it.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lcpatch_kernels import sparse_decode

from ..core.errors import UnsupportedModelError
from ..core.registry import Registry
from ..hf.models import attention_modules, full_attention_layers, unwrap, why_no_full_attention
from ..hf.route import route
from ..hf.watch import Call, attend
from .fixed import HALF_WAY, Steps, get_ready
from .slots import GRAIN, enlarged, most_room
from .state import fitting, whole

caches: Registry[type[LongCache]] = Registry("cache", package="lcpatch.caches")


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
        rows = len(tensors.get("keys", ()))
        found = fitting(tensors, {"keys": like, "values": like}, rows, None)
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
        capacity = max(needed, self.capacity, enlarged(self.length))
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

    def can_trace(self, num: int) -> bool:
        return True

    def wants_dense(self, query: Tensor) -> bool:
        return query.shape[2] == 1 and query.is_cuda

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.query.shape[2] > 1:
            return attend(call)
        bounds = None if call.bounds is None else call.bounds[:, 0, 2:]
        return decode(call, call.key, call.value, spec=call.spec, bounds=bounds)


class AttendingLayer(DynamicLayer):
    """A layer that computes attention over what it keeps, which is not simply every token in order.

    It takes new keys and values when transformers hands them over (`update`) and stores them when their queries attend.
    Positions and masks stay those of the whole sequence, so a model's position ids and padding are right whatever is
    freed; each row's pads are learnt where the row begins.

    A subclass implements `attend` (`_begin` first), `crop`, `batch_select_indices`, `memory`, and adds to `_clear` and
    `lazy_initialization`.
    """

    is_croppable = True
    expected = False
    owner: ClassVar[str] = "this cache"  # in messages
    again: ClassVar[str] = "and not once lcpatch.remove(model) was called: make a new cache"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # tokens, pads included
        self.pads: list[int] = []  # per row: pads before its first token
        self._new: tuple[Tensor, Tensor] | None = None  # keys and values of a step whose attention has not come yet
        self.midway = False
        self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pads = [0] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, K, T, D]; they are stored when their queries attend."""
        if self.is_midway():
            raise RuntimeError(f"{self.owner}: {HALF_WAY}")
        if not self.expected:
            raise RuntimeError(
                f"{self.owner}: this model's attention does not ask the cache; it works only with the model it was "
                f"made for, {self.again}"
            )
        self.expected = False
        if key_states.is_meta:
            raise UnsupportedModelError(
                f"{self.owner}: a model on the meta device has no keys and values to keep; load its weights first"
            )
        if torch.is_autocast_enabled(key_states.device.type):  # rotary embeddings leave keys in fp32 beside the values
            key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != len(self.pads):
            raise ValueError(
                f"{self.owner} holds {len(self.pads)} rows, the step has {key_states.shape[0]}: for another batch call "
                "cache.reset(), for beams or samples of each row cache.batch_repeat_interleave(n)"
            )
        self._new = (key_states, value_states)
        return self._new

    def can_trace(self, num: int) -> bool:
        return False

    def is_midway(self) -> bool:
        """Whether it took tokens whose queries have not attended yet."""
        return self._new is not None or self.midway

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.pads)).repeat_interleave(repeats))

    def wants_dense(self, query: Tensor) -> bool:
        return True  # what the dense implementation needs may be gone

    def _begin(self, call: Call) -> tuple[Tensor, Tensor]:
        """The step's new keys and values, after a look at its padding.

        Raises:
            UnsupportedModelError: the model attends to something that it made of them.
        """
        new, self._new = self._new, None
        if call.key is not new[0] or call.value is not new[1]:
            raise UnsupportedModelError(
                f"{self.owner}: this model attends to other keys or values than its cache returned, and those are not "
                "kept; use transformers' DynamicCache for it"
            )
        self._read_pads(call.bounds, call.query.shape[2])
        self.midway = True  # until `hf.watch.ask` has the answer
        return new

    def _read_pads(self, bounds: Tensor | None, num_queries: int) -> None:
        """Learn where rows begin, and check that nothing else is hidden. Reads the bounds back, so in chunks only."""
        if bounds is None or (num_queries == 1 and all(self.seen > pads for pads in self.pads)):
            return
        if bounds.shape[1] > 1:
            raise ValueError(f"{self.owner}: packed documents in one row cannot be continued; give each its own row")
        end = self.seen + num_queries
        for row, (_, _, k0, k1) in enumerate(bounds[:, 0].tolist()):
            if k1 not in (k0, end):
                raise ValueError(
                    f"{self.owner}: row {row} is padded on the right; pad on the left (tokenizer.padding_side)"
                )
            if self.seen <= self.pads[row]:
                self.pads[row] = k0 if k1 > k0 else end
            elif k0 != self.pads[row]:
                raise ValueError(
                    f"{self.owner}: row {row} began after {self.pads[row]} pads, the mask now hides {k0} tokens"
                )


class LongCache(Cache):
    """Base of lcpatch's caches: a container whose layers may attend by themselves.

    `chunks_differ` says why a prompt read in chunks gives other logits than in one forward once the cache keeps less
    than all of it; empty where they are the same.
    """

    name: ClassVar[str]
    attends = True
    places: ClassVar[tuple[str, ...]] = ()  # options that say where this machine keeps it: no file brings them
    chunks_differ: ClassVar[str] = ""
    _inference = False  # a step was taken under torch.inference_mode

    def __new__(cls, *args: Any, **kwargs: Any) -> LongCache:
        """Remember what the cache was made with and for: `save` writes it down."""
        self = super().__new__(cls)
        self._given = (args[1:], {k: v for k, v in kwargs.items() if k != "model"})
        model = args[0] if args else kwargs.get("model")
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._steps: dict[torch.device, Steps] = {}
        return self

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """What a mask is made of; asked before a step, so layers that generate in fixed buffers get ready here.

        Where they do, it is (0, 0): no mask is read. They wait for the device only where there may be no room left.
        """
        if query_length == 1 and not torch.compiler.is_compiling():
            get_ready(self.layers, self._steps, self.check_whole)
        return super().get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' caches: a layer's new keys and values.

        Raises:
            RuntimeError: what is held was written under `torch.inference_mode`, and this step is outside of it; or an
                earlier forward failed between two layers.
        """
        if torch.compiler.is_compiling():  # dynamo cannot ask what follows; the steps before have
            layer = self.layers[layer_idx]
            if isinstance(layer, AttendingLayer) and not layer.can_trace(key_states.shape[2]):
                return _update_eagerly(self, key_states, value_states, layer_idx, *args, **kwargs)
        else:
            if layer_idx == next(n for n, layer in enumerate(self.layers) if isinstance(layer, DynamicLayer)):
                self.check_whole(key_states.shape[2])
            inference = torch.is_inference_mode_enabled()
            if self._inference and not inference:
                raise RuntimeError(
                    f"{type(self).__name__}: it was filled under torch.inference_mode(), whose tensors cannot be "
                    "changed outside: go on under torch.inference_mode(), or fill it under torch.no_grad()"
                )
            self._inference = inference
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_whole(self, num: int = 2) -> None:
        """Refuse to go on, or a step of `num` tokens, where an earlier forward failed half-way.

        On numbers of the host: layers that generate in fixed buffers count on the device, so they are asked only before
        they enter, and with several tokens, when they leave those and wait for the device anyway.

        Raises:
            RuntimeError: layers have seen different numbers of tokens, or one took some that never attended.
        """
        layers = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        if num == 1:
            layers = [layer for layer in layers if getattr(layer, "steps", None) is None]
        asunder = len({layer.get_seq_length() for layer in layers}) > 1
        if asunder or any(layer.is_midway() for layer in layers if isinstance(layer, AttendingLayer)):
            raise RuntimeError(f"{type(self).__name__}: {HALF_WAY}")

    def reset(self) -> None:
        self._inference = False
        super().reset()

    def model(self) -> nn.Module | None:
        """The model that the cache was made for, while it is there."""
        return None if self._model is None else self._model()

    def options(self) -> dict[str, Any]:
        """What the cache was made with beside the model, by name."""
        args, kwargs = self._given
        given = inspect.signature(type(self).__init__).bind(self, None, *args, **kwargs).arguments
        return dict(list(given.items())[2:])

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk: int = 8192) -> None:
        """Read a prompt ahead of `generate`, `chunk` tokens at a time, without computing logits.

        All but the last token, which `generate(input_ids, past_key_values=cache)` needs; what the cache has seen of it
        already is not read again. Unlike `generate(prefill_chunk_size=…)` this never compiles the model for a chunk.

        Args:
            input_ids: [B, T], the whole text so far.
            attention_mask: [B, T], 0 for left padding; None: no padding.
            chunk: tokens at a time.

        Raises:
            ValueError: the model is gone, or `chunk` is below 1.
        """
        model = self.model()
        if model is None or chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1" if model else "the model of this cache is gone")
        decoder, end = unwrap(model).get_decoder(), input_ids.shape[1] - 1
        for start in range(self.get_seq_length(), end, chunk):
            stop, padding = min(start + chunk, end), {}
            if attention_mask is not None:
                positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
                padding = {"attention_mask": attention_mask[:, :stop], "position_ids": positions}
            decoder(input_ids=input_ids[:, start:stop], past_key_values=self, use_cache=True, **padding)

    def save(self, path: str | Path, tokenizer: Any = None) -> Path:
        """Write the cache to one safetensors file, whole or not at all; `lcpatch.load_cache(path, model)` reads it.

        Args:
            path: of the file.
            tokenizer: if given, loading with another one is refused.

        Raises:
            StoreError: layers or options that cannot be written, a full disk, or a model that is gone.
            RuntimeError: an earlier forward failed half-way.
        """
        from .store import save_cache

        return save_cache(self, path, tokenizer)

    def memory(self) -> dict[str, int]:
        """Bytes held per tier: "device", and where a cache has them "host" and "disk"."""
        return bytes_held(self.layers)

    def stats(self, measure: bool = False) -> dict[str, Any]:
        """How many tokens were seen, and how many are kept.

        `seen`: pads included. `kept`: per (row, KV head), the most of a row; `kept_by_layer`. `kept_share`: of the real
        tokens of all rows, over the layers; None before the first. It is no share of attention: how much dropped tokens
        would be given now, nobody can say.

        Args:
            measure: also the attention mass recalled, where everything is still there: retrieval and tiered caches.

        Raises:
            ValueError: `measure` of a cache that drops, merges or never reads again.
        """
        if measure:
            raise ValueError(
                f"the {self.name} cache does not have what it left out, so nothing can be measured against it; "
                "retrieval and tiered caches keep everything: stats(measure=True) is theirs"
            )
        rows = {n: layer.kept_of_rows() for n, layer in enumerate(self.layers) if hasattr(layer, "kept_of_rows")}
        kept = {n: max((held for held, _ in of), default=0) for n, of in rows.items()}
        total, real = (sum(row[i] for of in rows.values() for row in of) for i in range(2))
        return {
            "seen": self.get_seq_length(),
            "kept": max(kept.values(), default=0),
            "kept_by_layer": kept,
            "kept_share": total / real if real else None,
        }


@torch.compiler.disable
def _update_eagerly(cache: LongCache, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return cache.update(*args, **kwargs)


def stock_layers(config: Any, modules: Iterable[int], owner: str) -> list[Any]:
    """transformers' own cache layers for a model whose attention layers are `modules`.

    Raises:
        UnsupportedModelError: some of them read what another layer's update returned, which for a layer of ours is not
            all that it keeps.
    """
    layers = DynamicCache(config=config).layers
    if shared := [n for n in modules if n >= len(layers) or type(layers[n]).__name__ == "DummyLayer"]:
        raise UnsupportedModelError(
            f"{owner}: layers {shared} of {config.model_type} read the keys of other layers, which only transformers' "
            "own caches can hand on"
        )
    return layers


def routed_layers(model: nn.Module, owner: str, make: Callable[[int, nn.Module], Any]) -> list[Any]:
    """The layers of a cache for `model`, whose attention will ask them.

    `make(index, module)` for every layer that attends to its whole past; transformers' own for the others (windows,
    linear attention), which is said.

    Raises:
        UnsupportedModelError: an encoder-decoder, no full-attention layer, or attention that cannot be exchanged.
    """
    base = unwrap(model)
    modules = attention_modules(base)
    full = full_attention_layers(base.config, modules)
    if not full:
        raise UnsupportedModelError(f"{owner}: {why_no_full_attention(base.config)}")
    layers = stock_layers(base.config, modules, owner)
    if other := [n for n in full if type(layers[n]) is not DynamicLayer]:
        kind = type(layers[other[0]]).__name__
        raise UnsupportedModelError(f"{owner}: layer {other[0]} of {base.config.model_type} needs a {kind} of its own")
    if stock := [n for n in range(len(layers)) if n not in full]:
        warnings.warn(
            f"{owner}: layers {stock} do not attend to their whole past and keep transformers' own cache", stacklevel=3
        )
    for index in full:
        layers[index] = make(index, modules[index])
    route(model)
    return layers


def decode(call: Call, keys: Tensor, values: Tensor, **which: Any) -> tuple[Tensor, ...]:
    """`sparse_decode` of the call's queries over `keys` and `values`; `which` says over which of them."""
    impl = call.impl if call.impl in ("triton", "reference") else "auto"
    return sparse_decode(call.query, keys, values, scale=call.scale, softcap=call.softcap, impl=impl, **which)


def negative(tokens_to_remove: Any) -> int:
    """What `crop` is given, as an int <= 0; assisted decoding in transformers 5.17 hands over a tensor.

    Raises:
        ValueError: a positive number, which once meant the length to keep.
    """
    tokens_to_remove = int(tokens_to_remove)
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): give a negative number, how many tokens to remove from the end")
    return tokens_to_remove


def bytes_held(layers: Iterable[Any]) -> dict[str, int]:
    """Bytes per tier that layers of ours or of transformers hold."""
    total = {"device": 0}
    for layer in layers:
        for tier, held in _tiers(layer).items():
            total[tier] = total.get(tier, 0) + held
    return total


def _tiers(layer: Any) -> dict[str, int]:
    if hasattr(layer, "tiers"):
        return layer.tiers()
    if hasattr(layer, "memory"):
        return {"device": layer.memory()}
    held: dict[str, dict[int, int]] = {"device": {}}
    for x in tensors_in(vars(layer)):  # transformers' offloaded layers leave the device that they were made on
        tier = "device" if x.device == getattr(layer, "device", x.device) else "host"
        held.setdefault(tier, {})[x.data_ptr()] = x.untyped_storage().nbytes()
    return {tier: sum(sizes.values()) for tier, sizes in held.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that hold a value's data: linear attention keeps its states in dictionaries, quantised layers keep
    tuples, or tensors that are made of others and have no storage."""
    if isinstance(value, dict | tuple | list):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(x)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _grown(x: Tensor, capacity: int, filled: int) -> Tensor:
    """A buffer of `capacity` tokens with x's first `filled` ones."""
    new = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    new[:, :, :filled] = x[:, :, :filled]
    return new


def to_list(indices: Tensor) -> list[int]:
    """Host copy of a small index tensor; reading it back waits for the device."""
    return torch.as_tensor(indices).tolist()
