"""A cache on an unpatched model: its attention comes to our function, which asks the cache, and else does as before.

Everything but a forward with a cache of ours stays bit-equal: other caches, none at all, training.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers import dense_states
from .models import attention_modules, unwrap
from .own_config import OwnConfigs
from .registration import NAME, check_dense, register
from .state import ATTRIBUTE, ROUTED
from .watch import unwatch, watch

ROUTE = "_lcpatch_route"


def route(model: nn.Module) -> dict[int, nn.Module]:
    """Let caches of ours attend in `model`, patched or not; idempotent. `lcpatch.remove(model)` undoes it.

    Returns:
        The model's attention modules by layer.

    Raises:
        UnsupportedModelError: an encoder-decoder, or attention that transformers cannot exchange.
    """
    base = unwrap(model)
    modules = attention_modules(base)
    if base.config._attn_implementation != NAME:
        dense = check_dense(base.config._attn_implementation or "eager")
        register()
        setattr(base, ROUTE, OwnConfigs.take(model, base, {ROUTED: dense}))
        for index, state in dense_states(base.config, modules, dense).items():
            setattr(modules[index], ATTRIBUTE, state)
    watch(modules)
    return modules


def is_routed(base: Any) -> bool:
    """Whether the transformers model `base` runs through our attention without a patch."""
    return ROUTE in base.__dict__


def unroute(model: nn.Module) -> None:
    """Undo `route` on a model that it changed."""
    base = unwrap(model)
    configs: OwnConfigs | None = base.__dict__.pop(ROUTE, None)
    if configs is None:
        return
    for module in base.modules():
        module.__dict__.pop(ATTRIBUTE, None)
        unwatch(module)
    configs.give_back(model, base)
