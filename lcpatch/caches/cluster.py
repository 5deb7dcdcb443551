"""Chelsea's cache, now CentroidKV: similar keys are merged into centroids instead of being dropped.

Source: arXiv 2506.11418: chunked soft matching with an alternating partition, many to one, no training. One pass at
most halves what it is given, so 80 % compression takes three. What the paper leaves open, and what is done here:

    weights     a centroid is the mean over its tokens, so sizes are carried through repeated passes
    log size    its score gets the log of its size: softmax then sees one key for each of its tokens, which is exact
                where they were equal; without it a cluster of 8 would have the mass of one token
    trigger     as for every budgeted cache: after a step that leaves more than the budget, or, while generating, every
                `evict_every` tokens
    shares      every stretch of text keeps slots in proportion to its tokens: new tokens are merged down to the ratio
                that holds for all, older centroids only as far as that ratio falls. Giving the same share at every
                merge would halve the oldest text again and again

Keys are merged as they are stored, rotated: within a chunk mostly neighbours join. Sinks and recent tokens are never
merged, and a centroid stands at the position of one of its tokens.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lcpatch_kernels import cluster_merge
from lcpatch_kernels.cluster_merge import MergeImpl

from .budget import Budget, check_integer
from .cache import LongCache, caches, routed_layers
from .evicting import EvictingLayer
from .fixed_slots import FixedSlots
from .rows import alike, as_index, to_list
from .slots import Slots
from .untrusted import wholes


@caches.register("cluster")
class ClusterCache(LongCache):
    """`model.generate(**inputs, past_key_values=ClusterCache(model, budget=0.25))`: centroids instead of tokens.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: slots kept per KV head, sinks and recent tokens included; a float is a share of the row's tokens.
        num_sinks: the row's first real tokens, never merged; at least one.
        recent: the newest tokens, never merged: how many, or as a float which share of what the sinks leave.
        chunk: slots among which a key looks for its likes, even. Larger finds better ones, at chunk / 2 products a key.
        passes: the least number of passes of a compaction; each gives up the same share, at most half. More than
            needed (the default, 1, takes what is needed) match anew more often, on centroids.
        weighted: False: plain means, which forget how many tokens a centroid stands for (an ablation).
        log_size: False: no correction of a centroid's score (an ablation).
        evict_every: while generating, tokens between two compactions; default: a 32nd of the budget, at most 256.
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".
        impl: of `lcpatch_kernels.cluster_merge`.
        compiled: generate in buffers that never move, as in `H2OCache`.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: options out of range.
    """

    chunks_differ = "a chunk sees the centroids of what came before it, and texts are merged where chunks end"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float = 0.25,
        *,
        num_sinks: int = 4,
        recent: int | float = 0.25,
        chunk: int = 128,
        passes: int = 1,
        weighted: bool = True,
        log_size: bool = True,
        evict_every: int | None = None,
        codec: str | None = None,
        impl: str = "auto",
        compiled: bool = False,
    ) -> None:
        if not isinstance(chunk, int) or chunk < 2 or chunk % 2:
            raise ValueError(f"chunk={chunk!r} must be an even integer >= 2: its slots take turns in two halves")
        check_integer("passes", passes, 1)
        if impl not in get_args(MergeImpl):
            raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, get_args(MergeImpl)))}")
        if num_sinks == 0:
            raise ValueError("num_sinks=0: ClusterCache needs at least one sink, where attention rests")
        kept = Budget(budget, num_sinks, recent, evict_every, free=1)
        options = Merging(chunk, passes, weighted, impl)

        def make(index: int) -> ClusterLayer:
            return ClusterLayer(kept, options, log_size, codec, compiled)

        super().__init__(layers=routed_layers(model, "ClusterCache", make, compiled))


class Merging(NamedTuple):
    """How slots are merged; see `ClusterCache`."""

    chunk: int = 128
    passes: int = 1
    weighted: bool = True
    impl: str = "auto"


class Clusters(NamedTuple):
    """Slots of some rows: keys and values [B, K, S, D], sizes fp32 and positions int32 [B, K, S]."""

    keys: Tensor
    values: Tensor
    size: Tensor
    position: Tensor

    def part(self, begin: int, end: int) -> Clusters:
        return Clusters(*(x[:, :, begin:end] for x in self))


class ClusterLayer(FixedSlots, EvictingLayer):
    """One layer: what is over the budget is merged."""

    owner = "ClusterCache"
    fields: ClassVar = {"joined": torch.float32, "log_size": torch.float32}  # a slot's tokens but one; log(1 + joined)

    def __init__(
        self, budget: Budget, merging: Merging, log_size: bool, codec: str | None, fixed: bool = False
    ) -> None:
        self.merging = merging
        self.log_size = log_size
        super().__init__(budget, codec, fixed)

    def _clear(self) -> None:
        super()._clear()
        self.centroids: list[int] = []  # per row: slots behind its sinks that have been through a merge

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.centroids = [0] * key_states.shape[0]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.centroids = [self.centroids[r] for r in to_list(indices)] if self.is_initialized else []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = super().state()
        return tensors, numbers | {"centroids": self.centroids}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        super().load_state(tensors, numbers, like)
        self.centroids = wholes(numbers, "centroids", len(self.pads), max(self.counts))

    def bias(self) -> Tensor | None:
        if not self.log_size or (self.steps is None and not any(self.centroids)):
            return None
        return self.slots.tensors["log_size"]

    def evict(self, targets: list[int]) -> None:
        length, most = self.slots.length, max(targets)
        out = self._empty(most)
        for rows in alike(zip(self.counts, targets, self.budgets, self.centroids, self.pads, strict=True)):
            row, which = rows[0], as_index(rows, len(self.pads), self.device)
            count, target = self.counts[row], targets[row]
            old, new = length - count, most - target
            if target == count:
                for name, x in self.slots.tensors.items():
                    out[name][which, :, new:most] = x[which, :, old:length]
                continue
            sinks, recent = self.budget.protected(self.budgets[row])
            middle = self._clusters(which, old + sinks, length - recent)
            tokens = self.seen - self.pads[row] - sinks - recent
            merged = shrink(middle, self.centroids[row], target - sinks - recent, tokens, self.merging)
            for name, x in self._parts(merged).items():
                out[name][which, :, new + sinks : most - recent] = x
            for name, x in self.slots.tensors.items():
                out[name][which, :, new : new + sinks] = x[which, :, old : old + sinks]
                out[name][which, :, most - recent : most] = x[which, :, length - recent : length]
            for row in rows:
                self.centroids[row] = target - sinks - recent
        self.slots = Slots(out, most)

    def _empty(self, most: int) -> dict[str, Tensor]:
        """Buffers for `most` slots: those from before the step, if they fit."""
        capacity = max(self._capacity(most), most)
        old = self._buffers
        if old is not None and old is not self.slots and not old.borrowed and most <= old.capacity <= capacity:
            return old.tensors
        return {n: x.new_zeros(*x.shape[:2], capacity, *x.shape[3:]) for n, x in self.slots.tensors.items()}

    def _clusters(self, which: Tensor | slice, begin: int, end: int) -> Clusters:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        tensors = {name: x[which, :, begin:end] for name, x in self.slots.tensors.items()}
        keys, values = (self._decoded(Slots(tensors, end - begin), name, like) for name in ("keys", "values"))
        return Clusters(keys, values, tensors["joined"] + 1, tensors["position"])

    def _parts(self, clusters: Clusters) -> dict[str, Tensor]:
        """Clusters as the tensors that are stored."""
        parts = {"position": clusters.position, "joined": clusters.size - 1, "log_size": clusters.size.log()}
        for name, x in (("keys", clusters.keys), ("values", clusters.values)):
            parts |= {name + suffix: part for suffix, part in self.codec.encode(x).items()}
        return parts


def shrink(middle: Clusters, old: int, to: int, tokens: int, merging: Merging) -> Clusters:
    """Merge `middle`, which stands for `tokens` tokens, down to `to` slots.

    Its first `old` slots are centroids, the others new tokens; both parts keep slots in proportion to their tokens.
    """
    slots = middle.size.shape[2]
    old = min(old, slots)
    new = slots - old
    share = min(max(round(new * to / tokens), 1), new) if new else 0
    keep_old = min(max(to - share, min(old, 1)), old)
    older, newer = middle.part(0, old), middle.part(old, slots)
    if to - keep_old < min(new, 1):  # one slot for both
        return reduce(middle, to, merging)
    parts = reduce(older, keep_old, merging), reduce(newer, to - keep_old, merging)
    return Clusters(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def reduce(clusters: Clusters, to: int, merging: Merging) -> Clusters:
    """Exactly `to` slots, in as many passes as that takes or `merging.passes`, each giving up the same share."""
    left = clusters.size.shape[2]
    passes = max(merging.passes, math.ceil(math.log2(left / to))) if to < left else 0
    for done in range(passes):
        wanted = left - round(left * (to / left) ** (1 / (passes - done)))
        clusters = one_pass(clusters, min(max(wanted, 0), left // 2), merging)
        left = clusters.size.shape[2]
    while left > to:  # shares were rounded
        clusters = one_pass(clusters, min(left - to, left // 2), merging)
        left = clusters.size.shape[2]
    return clusters


def one_pass(clusters: Clusters, gives: int, merging: Merging) -> Clusters:
    """Give up exactly `gives` slots, at most half: all chunks alike, earlier ones one more where it does not divide."""
    if gives == 0:
        return clusters
    chunk, slots = merging.chunk, clusters.size.shape[2]
    whole, rest = divmod(slots, chunk)
    last = max(gives * rest // slots, gives - whole * (chunk // 2))
    each, more = divmod(gives - last, whole) if whole else (0, 0)
    parts = [
        _merged(clusters.part(0, more * chunk), chunk, each + 1, merging),
        _merged(clusters.part(more * chunk, whole * chunk), chunk, each, merging),
        _merged(clusters.part(whole * chunk, slots), rest // 2 * 2, last, merging),
    ]
    parts = [part for part in parts if part.size.shape[2]]
    return parts[0] if len(parts) == 1 else Clusters(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def _merged(clusters: Clusters, chunk: int, merges: int, merging: Merging) -> Clusters:
    """A pass over whole chunks (a slot behind them stays as it is)."""
    keys, values, size, position = clusters
    if merges == 0 or size.shape[2] == 0:
        return clusters
    keys, values, size, target = cluster_merge(
        keys, values, size, chunk=chunk, merges=merges, weighted=merging.weighted, impl=merging.impl
    )
    place = torch.empty_like(position[:, :, : size.shape[2]])
    for turn in (0, 1):  # every second slot may have joined another; then that one's position is the last to be written
        place.scatter_(2, target[:, :, turn::2].long(), position[:, :, turn::2])
    return Clusters(keys, values, size, place)
