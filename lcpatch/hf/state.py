"""What a patched attention module knows: which pattern it follows, when, and what it does otherwise."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lcpatch_kernels import DENSE, BlockSparseSpec, Rule

ATTRIBUTE = "_lcpatch"
"""The attribute of an attention module that holds its `LayerState`."""

SINK_LOGIT = "lcpatch_sink_logit"
"""The parameter of an attention module that holds its learnable sink logits: [H], or [H, n] of n prefix sinks."""

SINK_KEY = "lcpatch_sink_key"
"""The parameter that holds the keys of prefix sinks, [K, n, D], not rotated."""

SINK_VALUE = "lcpatch_sink_value"
"""The parameter that holds their values, [K, n, D]."""

ON_REMOVE = "_lcpatch_on_remove"
"""The attribute of a model that holds what takes off what was set on top of its patch."""

ROUTED = "_lcpatch_dense"
"""The attribute of a routed model's config that names the attention it had. A config saved meanwhile carries it along,
without effect."""


class Note(threading.local):
    """What a thread's forward has noted of its cache; threads share a model, each with a cache of its own."""

    def __init__(self) -> None:  # for every thread; dynamo guards on what is in its dictionary, so not on the class
        self.layer: Any = None

    def __reduce__(self) -> tuple[type[Note], tuple[()]]:
        return Note, ()  # a model that is copied or pickled is between forwards


@dataclass
class LayerState:
    """State of one attention module.

    Args:
        method: name of the pattern, for messages; None for a layer that stays dense.
        spec: the pattern compiled for this layer's heads; None for a layer that stays dense.
        mode: "train", "always" or "never".
        dense: transformers' name of the attention implementation for what stays dense.
        impl: implementation of `lcpatch_kernels.block_sparse`.
        follows_length: the spec needs the whole sequence at once (see `AttentionPattern.follows_length`).
        max_positions: the model's trained range of positions, in tokens; None if unknown.
        own: what the layer attends to without a pattern: everything before, or its own sliding window. Built ahead,
            as a spec cannot be built under tracing.
        routed: the model is not patched and came here for its cache only (see `route`).
        parallel: the ranks that this layer's attention reaches over (see `training.parallel`), with
            `attend(layer, call, shard) -> (out, lse)`; None: this process has all tokens.
        note: its `layer` refers to the cache layer that this forward's attention is to ask (see `watch`).
    """

    method: str | None
    spec: BlockSparseSpec | None
    mode: str
    dense: str
    impl: str = "auto"
    follows_length: bool = False
    max_positions: int | None = None
    own: BlockSparseSpec | None = None
    routed: bool = False
    parallel: Any = None
    note: Note = field(default_factory=Note, init=False, repr=False, compare=False)

    def active_spec(self, module: nn.Module) -> BlockSparseSpec | None:
        """The spec to run now, or None to leave this call to the dense implementation.

        A learnable sink is part of the model, so a module that has one runs our op even where it is dense.
        """
        sparse = self.spec is not None and (self.mode == "always" or (self.mode == "train" and module.training))
        if sparse:
            return self.spec
        return self.own if hasattr(module, SINK_LOGIT) else None


def own_spec(num_heads: int, window: int | None) -> BlockSparseSpec:
    """Causal attention within `window` tokens, or within everything."""
    return BlockSparseSpec.of([DENSE if window is None else Rule(back=window - 1)] * num_heads)


def dense_name(config: Any) -> str:
    """The implementation of what the patch leaves dense: "sdpa" if the config says nothing."""
    patch = getattr(config, "lcpatch", None) or {}
    return patch.get("dense") or getattr(config, ROUTED, "sdpa")
