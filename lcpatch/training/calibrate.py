"""Which layers and heads of a pretrained model lose least under a pattern: those whose attention lies within it.

The share of a row's attention that falls on the keys a pattern keeps is exp(lse_sparse - lse_dense): both sums of
exponentials come from the attention op, so nothing of size T x T is made. What a pattern would cut off decides which
layers stay dense ("choose dense heads by attention mass", arXiv 2407.17678's way of adapting a dense checkpoint; the
measure is ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcpatch_kernels import BlockSparseSpec

from ..core.config import PatchConfig
from ..hf import watch
from ..hf.layers import state_of
from ..hf.models import attention_modules, evaluating, unwrap
from ..patching import apply, remove
from ..patching.apply import record_of
from ..patterns import AttentionPattern


@dataclass(frozen=True)
class Mass:
    """What a pattern keeps.

    Args:
        inside: fp64 [layers, query heads], the share of the attention that falls on kept keys, mean over rows.
        layers: index of each of those layers in the model.
        density: share of the causal pairs that are kept, mean over the heads.
    """

    inside: Tensor
    layers: tuple[int, ...]
    density: float

    def sparse_layers(self, keep_dense: int | float) -> tuple[int, ...]:
        """The layers to make sparse when those that lose most stay dense.

        Args:
            keep_dense: how many layers, or as a float which share of them.

        Raises:
            ValueError: none would be sparse, or fewer than none dense.
        """
        count = round(keep_dense * len(self.layers)) if isinstance(keep_dense, float) else keep_dense
        if not 0 <= count < len(self.layers):
            raise ValueError(f"keep_dense={keep_dense} must leave some of {len(self.layers)} layers sparse")
        by_mass = self.inside.mean(1).argsort(descending=True)[: len(self.layers) - count]
        return tuple(sorted(self.layers[n] for n in by_mass.tolist()))

    def kv_heads(self, num_kv_heads: int) -> Tensor:
        """[layers, KV heads]: the mean over the query heads that share one, which a pattern treats alike."""
        return self.inside.unflatten(1, (num_kv_heads, -1)).mean(2)


@torch.no_grad()
def attention_mass(
    model: nn.Module, pattern: str | AttentionPattern | PatchConfig | dict[str, Any], texts: Sequence[Tensor]
) -> Mass:
    """How much of a dense model's attention lies within a pattern, layer by layer and head by head.

    Args:
        model: a causal language model, not patched; it is put in eval mode for as long as this runs.
        pattern: what `lcpatch.apply` takes as a method.
        texts: token ids [B, T], without pads; T at least a few times the pattern's local part, or all lies inside.

    Raises:
        ValueError: a model that is patched already, or no text.
    """
    base = unwrap(model)
    if record_of(base) is not None:
        raise ValueError("the model is patched: lcpatch.remove(model) first, as its dense attention is looked at")
    if not texts:
        raise ValueError("give at least one text to measure on")
    apply(model, pattern, mode="never")
    try:
        states = {n: state_of(m) for n, m in attention_modules(base).items()}
        specs = {n: state.spec for n, state in states.items() if state is not None and state.spec is not None}
        sums = {n: torch.zeros(base.config.num_attention_heads, dtype=torch.float64) for n in specs}
        rows = 0
        for ids in texts:
            with evaluating(model), _listening(base, specs, sums):
                model(input_ids=ids.to(base.device), use_cache=False, logits_to_keep=1)
            rows += ids.numel()
    finally:
        remove(model)
    length = max(ids.shape[1] for ids in texts)
    density = sum(spec.density(length) for spec in specs.values()) / len(specs)
    return Mass(torch.stack([sums[n] / rows for n in specs]), tuple(specs), density)


@contextmanager
def _listening(base: Any, specs: dict[int, BlockSparseSpec], sums: dict[int, Tensor]) -> Iterator[None]:
    """While the model runs, add to `sums` what each layer's heads keep."""
    listeners = {n: _Listener(spec, sums[n]) for n, spec in specs.items()}
    modules = attention_modules(base)
    states = {n: state_of(modules[n]) for n in specs}

    def note(module: nn.Module, *_: Any) -> None:
        states[module.layer_idx].note.layer = lambda: listeners[module.layer_idx]

    hooks = [modules[n].register_forward_pre_hook(note) for n in specs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for state in states.values():
            state.note.layer = None


class _Listener:
    """In a cache layer's place: attends densely, and compares with what the pattern would have seen."""

    expected = False

    def __init__(self, spec: BlockSparseSpec, total: Tensor) -> None:
        self._spec, self._total = spec, total

    def wants_dense(self, query: Tensor) -> bool:
        return True

    def attend(self, call: watch.Call) -> tuple[Tensor, Tensor]:
        out, all_keys = watch.attend(call)
        _, kept = watch.attend(call._replace(spec=self._spec))
        self._total += (kept.double() - all_keys.double()).exp().sum((0, 2)).cpu()
        return out, all_keys
