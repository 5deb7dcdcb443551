"""Which models our attention can serve, and which of their layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..core.errors import UnsupportedModelError
from .layers import is_self_attention


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` wraps; any other as it is."""
    return getattr(model, "_orig_mod", model)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT or compiled wrapper."""
    model = uncompiled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The model's self-attention modules by layer index.

    Raises:
        UnsupportedModelError: transformers cannot exchange this model's attention, or it has no causal self-attention.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    works = (
        "a decoder-only model that uses transformers' attention interface, such as llama, mistral, qwen3 or gemma3_text"
    )
    if not hasattr(model, "_can_set_attn_implementation"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; wanted: {works}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; patterns are for causal self-attention: {works}")
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(f"{kind} has several parts; patch its language model, or load the text-only class")
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModelError(f"{kind} computes its attention inside its own layers; wanted: {works}")
    found = {m.layer_idx: m for m in model.modules() if is_self_attention(m)}
    if not found:
        raise UnsupportedModelError(f"{kind} has no causal self-attention layer; wanted: {works}")
    if any(hasattr(m, "kv_lora_rank") for m in found.values()):
        raise UnsupportedModelError(
            f"{kind} has latent attention (MLA), whose keys and values differ in size; wanted: {works}"
        )
    if any(getattr(m, "v_head_dim", None) not in (None, getattr(m, "head_dim", None)) for m in found.values()):
        raise UnsupportedModelError(f"{kind} has keys and values that differ in size; wanted: {works}")
    if any(getattr(m, "indexer", None) is not None for m in found.values()):
        raise UnsupportedModelError(
            f"{kind} has an indexer that chooses each token's keys, which it tells transformers' own attention only; "
            f"wanted: {works}"
        )
    return dict(sorted(found.items()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards each of its modules in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """What lies where a module computes: its parameters, and its buffers, where some quantised layers keep everything.

    Their dtype may be a packed one; a model computes in `model.dtype`.
    """
    return chain(module.parameters(), module.buffers())


def full_attention_layers(config: Any, indices: Iterable[int]) -> list[int]:
    """Those layers of `indices` that attend to their whole past."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [n for n in indices if types[n] == "full_attention"]
    windowed = any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    return [] if windowed else list(indices)


def why_no_full_attention(config: Any) -> str:
    """What a model without such layers has, and what to do instead, for messages."""
    if "hybrid" in (getattr(config, "layer_types", None) or ()):
        return (
            f"{config.model_type} runs attention and a state-space model side by side in one layer, which lcpatch does "
            "not take apart: generate with transformers' own cache (no past_key_values), or take a model whose "
            "attention layers stand alone, such as bamba or qwen3_next"
        )
    return (
        f"{config.model_type} has no layer that attends to its whole past: its windows or chunks are short already, "
        "and transformers' own cache keeps no more than they need; ours is for full-attention layers, as llama's are"
    )
