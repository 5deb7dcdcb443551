"""How the attention function learns of the cache: transformers passes it to the attention module, not to us.

A pre-forward hook on each attention module notes a cache of ours among its arguments; the attention function takes the
note, so that nothing outlives the forward. Other caches are none of our business and stay untouched.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lcpatch_kernels import BlockSparseSpec, block_sparse

from .layers import state_of
from .registration import NAME
from .state import ATTRIBUTE, LayerState

WATCH = "_lcpatch_watch"


class Call(NamedTuple):
    """One attention call: what a layer that attends by itself is given. Arguments as in `block_sparse`.

    `sinks` [B, H, T], detached, is the LSE of the layer's learnable sinks, for a cache that weighs keys by the
    attention they get. What `attend` returns is attention over the keys alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    spec: BlockSparseSpec
    bounds: Tensor | None
    scale: float | None
    softcap: float | None
    impl: str
    sinks: Tensor | None = None


def attend(call: Call, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The call as `block_sparse` runs it: keys and values hold every token in order."""
    q, k, v, spec, bounds, scale, softcap, impl, _ = call
    return block_sparse(q, k, v, spec, bounds=bounds, scale=scale, softcap=softcap, bias=bias, impl=impl)


class AttendingLayer(Protocol):
    """A cache layer that computes attention over what it keeps.

    `expected` is set before the module runs if its attention will ask the layer; one that keeps less than every token
    refuses an update that nobody announced, since other attention would take what it returns for all there is.
    `midway` is set while it changes what it keeps: one that finds it set was left half-way by an error.
    """

    expected: bool
    midway: bool

    def can_trace(self, num: int) -> bool:
        """Whether a step of `num` tokens can be compiled; what else it does is decided on the host."""

    def wants_dense(self, query: Tensor) -> bool:
        """Whether it also attends for calls that no pattern is active in, instead of the dense implementation."""

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """`(out [B, H, T, D], lse [B, H, T])` of the call's queries."""


def watch(modules: dict[int, nn.Module]) -> None:
    """Note caches of ours on these patched attention modules; idempotent."""
    for module in modules.values():
        if WATCH not in module.__dict__:
            module.__dict__[WATCH] = module.register_forward_pre_hook(_note, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Take the hook off again, if there is one, and what it noted for a forward that failed half-way."""
    if (handle := module.__dict__.pop(WATCH, None)) is not None:
        handle.remove()
    if (state := module.__dict__.get(ATTRIBUTE)) is not None:
        state.note.layer = None


def take_layer(state: LayerState) -> AttendingLayer | None:
    """The cache layer that attends for this call, or None."""
    layer, state.note.layer = state.note.layer, None
    return None if layer is None else layer()


def ask(layer: AttendingLayer, call: Call) -> tuple[Tensor, Tensor]:
    """What the layer answers, which it now keeps the step of."""
    if torch.compiler.is_compiling() and not layer.can_trace(call.query.shape[2]):
        return _ask_eagerly(layer, call)
    answer = layer.attend(call)
    layer.midway = False
    return answer


@torch.compiler.disable
def _ask_eagerly(layer: AttendingLayer, call: Call) -> tuple[Tensor, Tensor]:
    return ask(layer, call)


def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = state_of(module)
    if state is None:
        return
    state.note.layer = None  # of a forward that failed before its attention
    cache = next((x for x in kwargs.values() if getattr(x, "attends", False)), None)
    if cache is None or module.config._attn_implementation != NAME:
        return
    layer = cache.layers[module.layer_idx]
    if hasattr(layer, "attend"):
        layer.expected = True
        state.note.layer = weakref.ref(layer)  # a forward that fails half-way must not keep the cache alive
