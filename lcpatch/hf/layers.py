"""What each layer of a patched model follows, built from the patch in its config: when `apply` sets it, and on load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lcpatch_kernels import BlockSparseSpec, Rule

from ..core.config import PatchConfig, parse_sinks
from ..patterns import AttentionPattern, LayerShape, patterns
from .registration import NAME, check_dense
from .state import ATTRIBUTE, SINK_LOGIT, LayerState, own_spec


def is_self_attention(module: nn.Module) -> bool:
    """Whether `module` is a layer's causal self-attention, which a pattern can govern."""
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
        and "Attention" in type(module).__name__
        and hasattr(module, "config")
    )


def shape_of(config: Any, rank: int, num_sparse: int, layer: int = 0) -> LayerShape:
    """The heads of a model's layer, for the pattern."""
    num_heads = config.num_attention_heads
    return LayerShape(num_heads, num_kv_heads_of(config, layer), rank, num_sparse)


def num_kv_heads_of(config: Any, layer: int) -> int:
    """KV heads of a layer; those of some models differ (Gemma 4), whose config then has no number for all."""
    per_layer = getattr(config, "per_layer_config", None)  # of newer transformers
    own = config if per_layer is None else per_layer[layer]
    return getattr(own, "num_key_value_heads", None) or config.num_attention_heads


def head_dim_of(module: nn.Module) -> int:
    """Numbers in one head of an attention module."""
    return getattr(module, "head_dim", None) or module.config.hidden_size // module.config.num_attention_heads


def window_of(module: nn.Module) -> int | None:
    """The sliding window of an attention module; None if it attends to its whole past.

    Modules of some models (exaone4) name the window of other layers.
    """
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[module.layer_idx] == "full_attention":
        return None
    return getattr(module, "sliding_window", None)


def layer_states(
    config: Any, modules: Mapping[int, nn.Module], patch: PatchConfig, pattern: AttentionPattern, impl: str = "auto"
) -> dict[int, LayerState]:
    """The state of each module under a patch.

    Args:
        config: the model's config.
        modules: attention modules by layer index; not necessarily all.
        patch: the patch, its layers, mode and dense implementation resolved.
        pattern: the pattern that the patch describes.
        impl: implementation of the attention op.

    Raises:
        ValueError: rules that do not fit the model's heads.
    """
    states = dense_states(config, modules, patch.dense)
    for index, state in states.items():
        states[index] = replace(state, mode=patch.mode, impl=impl, routed=False)
        if index in patch.layers:
            shape = shape_of(config, patch.layers.index(index), len(patch.layers), index)
            rules = with_sink_tokens(pattern.rules(shape), patch.sinks)
            spec = BlockSparseSpec.of(rules, getattr(pattern, "block_size", 64))
            states[index] = replace(
                states[index], method=pattern.name, spec=spec, follows_length=pattern.follows_length
            )
    return states


def dense_states(config: Any, modules: Mapping[int, nn.Module], dense: str) -> dict[int, LayerState]:
    """The state of each module of a model that is not patched, whose attention is transformers' `dense`."""
    limit = _trained_range(config)
    return {
        index: LayerState(
            None,
            None,
            "never",
            dense,
            max_positions=limit,
            own=own_spec(config.num_attention_heads, window_of(module)),
            routed=True,
        )
        for index, module in modules.items()
    }


def _trained_range(config: Any) -> int | None:
    """Positions beyond which the model is lost; None if unknown, or if its frequencies follow the length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = (parameters.get("full_attention", parameters) or {}).get("rope_type")  # None: layers without positions
    return None if kind == "dynamic" else getattr(config, "max_position_embeddings", None)


def with_sink_tokens(rules: Iterable[Rule], sinks: str | None) -> list[Rule]:
    """`rules`, every row of which also sees the first tokens that `sinks` asks for."""
    rules = list(rules)
    parsed = parse_sinks(sinks)
    if parsed is None or parsed.kind != "tokens":
        return rules
    if any(rule.cyclic for rule in rules):
        raise ValueError(f"sinks={sinks!r} cannot be combined with rolled groups (wrap=True)")
    return [replace(rule, sinks=max(rule.sinks, parsed.count)) for rule in rules]


def state_of(module: nn.Module) -> LayerState | None:
    """The module's state, or None if it was never patched.

    A model that transformers loaded from a patched checkpoint has our name and `config.lcpatch`, but no states: each is
    built when it is first asked for, as transformers offers no place to do so at load.

    Raises:
        ValueError: the config's patch does not hold for this model, or needs `lcpatch.from_pretrained`.
    """
    state = getattr(module, ATTRIBUTE, None)
    if state is None and is_self_attention(module) and is_loaded_patched(module.config):
        state = _restored(module)
        setattr(module, ATTRIBUTE, state)
    return state


def is_loaded_patched(config: Any) -> bool:
    """Whether `config` says that its model runs through our attention function, under a patch."""
    return getattr(config, "_attn_implementation", None) == NAME and bool(getattr(config, "lcpatch", None))


def resolved_patch(config: Any) -> PatchConfig:
    """The patch that a loaded `config` carries.

    Raises:
        ValueError: it is not what `apply` writes.
    """
    if not isinstance(config.lcpatch, Mapping):
        raise ValueError(f"config.lcpatch must be a mapping, not {type(config.lcpatch).__name__}")
    patch = PatchConfig.from_dict(config.lcpatch)
    if not isinstance(patch.layers, tuple) or patch.mode is None or patch.dense is None:
        raise ValueError("config.lcpatch must name its layers, mode and dense, as lcpatch.apply writes them")
    if "/" in check_dense(patch.dense):
        raise ValueError(
            f"config.lcpatch has dense={patch.dense!r}, a kernel from the Hub, which a config may not choose"
        )
    return patch


def _restored(module: nn.Module) -> LayerState:
    if torch.compiler.is_compiling():
        raise ValueError("this model was loaded without lcpatch.from_pretrained: run it once before torch.compile")
    patch = resolved_patch(module.config)
    if patch.has_learnable_sinks and not hasattr(module, SINK_LOGIT):
        raise ValueError(
            "this model has learnable sinks, which transformers does not load: use lcpatch.from_pretrained, or "
            "attn_implementation='sdpa' to run it dense without them"
        )
    pattern = patterns.get(patch.method).from_options(dict(patch.options))
    return layer_states(module.config, {module.layer_idx: module}, patch, pattern)[module.layer_idx]
