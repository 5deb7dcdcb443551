"""What each attention layer of a model does, and why: the facts behind `lcpatch doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lcpatch_kernels.block_sparse import choose

from ..hf import NAME
from ..hf.layers import state_of
from ..hf.models import attention_modules, full_attention_layers, unwrap, weights_of


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Args:
        index: the layer's index.
        kind: the layer's type in the model ("full_attention", "sliding_attention", …).
        method: the pattern's name, or None where the layer stays dense.
        mode: when the pattern is active; None without one.
        runs: the implementation that would run now.
        why: the reason for it, in a few words.
    """

    index: int
    kind: str
    method: str | None
    mode: str | None
    runs: str
    why: str


def report(model: nn.Module) -> list[LayerReport]:
    """A report of every attention layer, patched or not."""
    base = unwrap(model)
    modules = attention_modules(base)
    full = full_attention_layers(base.config, modules)
    types = getattr(base.config, "layer_types", None)
    rows = []
    for index, module in modules.items():
        kind = types[index] if types is not None else "full_attention" if index in full else "sliding_attention"
        rows.append(_row(base, index, module, kind))
    return rows


def _row(base: Any, index: int, module: nn.Module, kind: str) -> LayerReport:
    state, implementation = state_of(module), base.config._attn_implementation
    if state is None or implementation != NAME:
        return LayerReport(index, kind, None, None, implementation, "not patched")
    if state.routed:
        return LayerReport(index, kind, None, None, state.dense, "not patched; a cache of lcpatch's may attend")
    if state.spec is None:
        why = "left dense by `layers`" if kind == "full_attention" else "attends within a window of its own"
        return LayerReport(index, kind, None, None, state.dense, why)
    spec = state.active_spec(module)
    if spec is None:
        why = "mode='never'" if state.mode == "never" else "mode='train' and the model is in eval mode"
        return LayerReport(index, kind, state.method, state.mode, state.dense, why)
    device = next(weights_of(module)).device
    like = torch.empty(1, spec.num_heads, 1, getattr(module, "head_dim", 64), dtype=base.dtype, device=device)
    chosen = choose(state.impl, like, spec)
    why = f"impl={state.impl!r} on {device.type}, {str(base.dtype).removeprefix('torch.')}"
    return LayerReport(index, kind, state.method, state.mode, f"block_sparse/{chosen}", why)
