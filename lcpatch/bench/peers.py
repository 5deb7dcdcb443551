"""Peers of `lcpatch bench cache`: transformers' quantised cache and NVIDIA's kvpress, where they install.

Neither is a dependency: an arm whose package is missing, or fails, is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import environment, measure
from .record import LACKS

INSTALL = {
    "hqq": "pip install hqq",
    "optimum-quanto": "pip install optimum-quanto",
    # it declares transformers<5.3, so that pip would take lcpatch's transformers away
    "kvpress": "pip install --no-deps kvpress && pip install cachetools datasets fire requests",
}
"""Package -> how it installs beside lcpatch."""

BACKENDS = {"hqq": ("hqq", 1), "optimum-quanto": ("quanto", 0)}
"""Package -> transformers' name for it and the axis along which its manual has it quantise."""


def missing(package: str | None) -> str | None:
    """What an arm needs that is not installed, as its row says it; None: nothing."""
    if package is None or environment.installed(package):
        return None
    return f"{LACKS}`{INSTALL[package]}`"


def failed(package: str, error: Exception) -> str:
    """An error of a peer's own, in a sentence."""
    fails = f"{package} {environment.installed(package)} fails under transformers {transformers.__version__}"
    return f"{fails}: {measure.in_a_line(error)}"


def quantized(package: str) -> Callable[..., QuantizedCache]:
    """Makes transformers' cache of int4 groups of 64, which computes all keys and values again at every step.

    optimum-quanto compiles CUDA code at its first step on a GPU: that takes nvcc, ninja and minutes. What was generated
    since is packed every 128 tokens, which the few tokens of a benchmark do not reach.
    """
    backend, axis = BACKENDS[package]

    def make(model: nn.Module, *_: int) -> QuantizedCache:
        return QuantizedCache(backend, model.config, axis_key=axis, axis_value=axis)

    return make


def pressed(press: str, ratio: float = 0.8) -> Callable[[nn.Module, Tensor, DynamicCache], None]:
    """Reads a prompt under a press of kvpress, which drops `ratio` of it from the DynamicCache after each layer.

    `SnapKVPress` is the nearest to H2O that long prompts allow: the attention of the last 64 tokens;
    `ObservedAttentionPress`, of all, takes eager attention and its matrix of tokens × tokens. `KnormPress` is the
    cheapest. kvpress asks the model for `cache_position`, which transformers makes no more since 5.4: it is given here.
    """

    def read(model: nn.Module, ids: Tensor, cache: DynamicCache) -> None:
        start = cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        with getattr(_kvpress(), press)(compression_ratio=ratio)(model):
            model(ids, past_key_values=cache, cache_position=positions, logits_to_keep=1)

    return read


def _kvpress() -> Any:
    """On import it wraps all of transformers' attention functions, for presses that differ by head.

    None here does, and other arms must run what transformers has: the wrappers go again.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS)
    import kvpress

    for name, function in before.items():
        if ALL_ATTENTION_FUNCTIONS[name] is not function:
            ALL_ATTENTION_FUNCTIONS[name] = function
    return kvpress
