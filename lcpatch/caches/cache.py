"""The container: a cache that the attention asks, and the layers that it is made of."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..core.errors import UnsupportedModelError
from ..core.flags import check_flag
from ..core.registry import Registry
from ..hf.head import decoder_of
from ..hf.models import attention_modules, full_attention_layers, unwrap, why_no_full_attention
from ..hf.route import route
from .fixed import Steps, check_layer, get_ready
from .held import bytes_held
from .layer import HALF_WAY, AttendingLayer, inference_mode_if

caches: Registry[type[LongCache]] = Registry("cache", package="lcpatch.caches")


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
        """Remember what the cache was made with and for: `save` writes it down.

        Raises:
            ValueError: an option that is on or off, and was given anything but True or False.
        """
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if isinstance(parameter.default, bool) and name in kwargs:
                check_flag(name, kwargs[name])
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
            self._check_inference()
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
            self._check_inference()
            self._inference = torch.is_inference_mode_enabled()
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

    def _check_inference(self) -> None:
        if self._inference and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: it was filled under torch.inference_mode(), whose tensors cannot be "
                "changed outside: go on under torch.inference_mode(), or fill it under torch.no_grad()"
            )

    def reset(self) -> None:
        self._inference, self._steps = False, {}
        super().reset()

    # What changes tensors between two forwards, also those that were made under torch.inference_mode.

    def crop(self, tokens_to_remove: int) -> None:
        with inference_mode_if(self._inference):
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with inference_mode_if(self._inference):
            super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        with inference_mode_if(self._inference):
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with inference_mode_if(self._inference):
            super().batch_repeat_interleave(repeats)

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
        decoder, end = decoder_of(unwrap(model)), input_ids.shape[1] - 1
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


def routed_layers(model: nn.Module, owner: str, make: Callable[[int], Any], compiled: bool = False) -> list[Any]:
    """The layers of a cache for `model`, whose attention will ask them.

    `make(index)` for every layer that attends to its whole past; transformers' own for the others (windows, linear
    attention), which is said.

    Raises:
        UnsupportedModelError: an encoder-decoder, no full-attention layer, or attention that cannot be exchanged.
        ValueError: `compiled`, and a layer that attends by a pattern.
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
        if compiled:
            check_layer(index, modules[index])
        layers[index] = make(index)
    route(model)
    return layers
