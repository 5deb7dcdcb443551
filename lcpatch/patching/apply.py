"""Set a pattern on a model, and take it off again without a trace."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from torch import nn

from lcpatch_kernels.block_sparse import Impl

from ..core.config import SPECS, PatchConfig
from ..core.errors import UnsupportedModelError
from ..hf import NAME, LayerState, register
from ..hf.layers import is_loaded_patched, layer_states, resolved_patch, shape_of
from ..hf.models import attention_modules, unwrap
from ..hf.own_config import OwnConfigs
from ..hf.registration import check_dense
from ..hf.route import is_routed, route, unroute
from ..hf.sinks import give_sinks, make_sinks, sinks_of
from ..hf.state import ATTRIBUTE, ON_REMOVE, dense_name
from ..hf.watch import unwatch, watch
from ..patterns import AttentionPattern
from .resolve import Layers, config_of, pattern_of, sparse_layers

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
RECORD = "_lcpatch_record"


@dataclass
class Record:
    """What `apply` set on a model, so that `remove` can take back exactly that.

    Args:
        config: the patch, every choice resolved.
        impl: the implementation that was asked for.
        configs: the model's config objects before, and the copies in use while patched.
    """

    config: PatchConfig
    impl: str
    configs: OwnConfigs


def apply(
    model: Model,
    method: str | AttentionPattern | PatchConfig | dict[str, Any],
    *,
    layers: Layers = None,
    mode: str | None = None,
    sinks: str | None = None,
    impl: str = "auto",
    **options: Any,
) -> Model:
    """Patch `model` in place so that its full-attention layers follow a pattern, and return it.

    A model that is patched already gets the new patch instead of the old one. Weights, modules and their forwards stay
    as they are; the model gets a config object of its own, so that others built from the same one are left alone.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        method: a name from `lcpatch.methods()`, a pattern such as `S2(stride=8)`, a dict or a `.yaml`/`.json` file in
            `PatchConfig`'s form.
        layers: which layers become sparse: a list of indices, "every_2" (layers 0, 2, 4, …), a function of the index;
            default: every full-attention layer. The others stay bit-equal.
        mode: "train" (sparse while `model.training`, dense otherwise), "always" or "never"; default: the method's own.
        sinks: "tokens" or "tokens:N": the first 4 or N real tokens stay visible to every row; "logit": a learnable
            logit per query head, as a parameter of each sparse layer. It starts at -15 and takes the share
            exp(-15 - LSE) of a row: nothing that fp32 shows unless a row's LSE is below about 0. "logit:START" sets
            another start: lower is closer to no change, higher has larger gradients. "prefix", "prefix:N" or
            "prefix:N:START": 4 or N learnable keys and values per KV head of each sparse layer, which every query
            attends to as if they stood before the first token. Values start at zero and the keys' logits at -8, so N
            take about the share N exp(-8 - LSE) of a row: .0013 for 4 of them where its LSE is 0, 9e-6 where it is 5.
            (At -15 nearly all gradients of a small model's were below 1e-8, Adam's eps; at -8 one in a hundred.)
        impl: implementation of the attention op: "auto", "triton", "reference", "sdpa" or "flex".
        **options: the method's options, as fields of its pattern.

    Raises:
        UnknownNameError: no such method; the message lists them.
        UnsupportedModelError: a model that cannot take a pattern.
        ValueError: an option, layer or mode that does not fit.
    """
    base = unwrap(model)
    if ON_REMOVE in base.__dict__:
        raise ValueError("this model is parallelized; patch it first, and parallelize it then")
    modules = attention_modules(base)
    if (record := record_of(base)) is not None:
        layer_config = record.configs.originals[0]
    else:
        layer_config = base.config  # of a routed model: the route's copy, which differs in nothing that is asked here
    if layers is not None:
        layers = sparse_layers(layers, layer_config, list(modules))
    config = config_of(method, {"layers": layers, "mode": mode, "sinks": sinks, **options})
    pattern = pattern_of(config)
    states, config = _states(layer_config, modules, pattern, config, impl)
    _check(modules, states, layer_config, config, pattern)

    routed = is_routed(base)
    if record is not None or routed:
        remove(model)
    register()
    patch = {**config.to_dict(), SPECS: specs_of(states)}
    setattr(base, RECORD, Record(config, impl, OwnConfigs.take(model, base, {"lcpatch": patch})))
    for index, module in modules.items():
        setattr(module, ATTRIBUTE, states[index])
        if states[index].spec is not None:
            give_sinks(module, make_sinks(module, config.sinks))
    if routed:  # a cache that was made for the unpatched model goes on being asked
        watch(modules)
    logger.info("patched %d of %d attention layers with %s", len(config.layers), len(modules), pattern)
    return model


def remove(model: Model) -> Model:
    """Take the patch off `model`, and what a cache or `parallelize` set, and return it; no-op if there is nothing.

    Everything that was set is restored.
    """
    base = unwrap(model)
    if (close := base.__dict__.get(ON_REMOVE)) is not None:
        close()
    unroute(model)
    record = record_of(base)
    if record is None:
        return model
    for module in base.modules():
        module.__dict__.pop(ATTRIBUTE, None)
        unwatch(module)
        give_sinks(module, {})
    record.configs.give_back(model, base)
    del base.__dict__[RECORD]
    return model


@contextmanager
def patched(model: Model, method: Any, **settings: Any) -> Iterator[Model]:
    """`with patched(model, "sf"):` applies a patch and afterwards restores what was there, an earlier patch too."""
    record, routed = record_of(unwrap(model)), is_routed(unwrap(model))
    held = {m: sinks for m in model.modules() if (sinks := sinks_of(m))}
    apply(model, method, **settings)
    try:
        yield model
    finally:
        if record is None:
            remove(model)
            if routed:
                route(model)
        else:
            apply(model, record.config, impl=record.impl)
            for module, sinks in held.items():
                give_sinks(module, sinks)


def record_of(base: Any) -> Record | None:
    """What was set on the transformers model `base`, or None if it is not patched.

    A model that transformers loaded patched gets the record that `apply` would have left.
    """
    record: Record | None = getattr(base, RECORD, None)
    if record is None and is_loaded_patched(getattr(base, "config", None)):
        record = Record(resolved_patch(base.config), "auto", OwnConfigs.of_loaded(base))
        for original in record.configs.originals:
            original.__dict__.pop("lcpatch", None)
            original._attn_implementation = record.config.dense
        setattr(base, RECORD, record)
    return record


def _states(
    model_config: Any, modules: dict[int, nn.Module], pattern: AttentionPattern, config: PatchConfig, impl: str
) -> tuple[dict[int, LayerState], PatchConfig]:
    """Each layer's state, and the config with every choice resolved."""
    chosen = sparse_layers(config.layers, model_config, list(modules))
    dense = config.dense or model_config._attn_implementation or "sdpa"
    if dense == NAME:  # a config that was taken from a patched model
        dense = dense_name(model_config)
    config = replace(
        config,
        options=pattern.to_options(),
        layers=tuple(chosen),
        mode=config.mode or pattern.default_mode,
        dense=check_dense(dense),
    )
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, get_args(Impl)))}")
    if config.mode == "always" and pattern.follows_length:
        raise ValueError(
            f"{pattern.name}: mode='always' must also work on a sequence that still grows, which has no length to take "
            f"a share of; give a fixed group_size, such as {pattern.name!r}, group_size=1024 (and no wrap)"
        )
    states = layer_states(model_config, modules, config, pattern, impl)
    for message in pattern.warnings(shape_of(model_config, 0, len(chosen), chosen[0])):
        warnings.warn(message, stacklevel=3)
    return states, config


def _check(
    modules: dict[int, nn.Module],
    states: dict[int, LayerState],
    model_config: Any,
    config: PatchConfig,
    pattern: AttentionPattern,
) -> None:
    """Refuse what would be dropped in silence later."""
    for index, state in states.items():
        module = modules[index]
        dropout = getattr(module, "attention_dropout", 0.0)
        dropout = getattr(dropout, "p", dropout)  # some models hold a Dropout module
        if state.spec is not None and dropout:
            raise ValueError(
                f"layer {index} has attention dropout {dropout}, which no pattern's kernel applies; set "
                "model.config.attention_dropout = 0.0 and module.attention_dropout = 0.0 on the attention modules first"
            )
    own = any(isinstance(getattr(m, "sinks", None), nn.Parameter) for m in modules.values())
    if config.has_learnable_sinks and own:
        raise UnsupportedModelError(
            f"{model_config.model_type} has learnable sink logits of its own; leave sinks={config.sinks!r} out"
        )
    if not pattern.causal:
        warnings.warn(f"{pattern}: rolled groups show the first group's tokens the sequence's end", stacklevel=3)


def specs_of(states: dict[int, LayerState]) -> dict[str, str]:
    """What a config carries for readers that know no patterns: each sparse layer's integers."""
    sparse = {index: state.spec for index, state in states.items() if state.spec is not None}
    return {str(index): " ".join(map(str, spec.to_ints())) for index, spec in sparse.items()}
