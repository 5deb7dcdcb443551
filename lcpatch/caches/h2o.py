"""H2O: a few tokens get most of the attention ("heavy hitters"), so keep those and the recent ones.

Source: arXiv 2306.14048 (section 4, algorithm 1). Each (row, KV head) adds up the attention that its tokens were given;
what is neither recent nor among the highest sums goes. Departures:

- The paper scores per query head of MHA; here the query heads that share a KV head are put together (`group`).
- Its accuracy tables mask with column sums over *later* queries too; here a token is gone once it is gone.
- The first `num_sinks` tokens are kept whatever their sums, and scores may be divided by age or decay: plain sums only
  grow, so the oldest tokens freeze in place ("mean", "decay" and `grace` are against that).
"""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lcpatch_kernels import attn_mass

from . import scattered
from .budget import Budget, check_integer
from .cache import LongCache, caches, routed_layers
from .evicting import EvictingLayer
from .fixed_slots import FixedSlots
from .layer import kernel_impl
from .rows import to_list
from .step import Step
from .untrusted import fitting

SCORES = ("sum", "mean", "decay")
GROUPS = ("sum", "mean", "max")


@caches.register("h2o")
class H2OCache(LongCache):
    """`model.generate(**inputs, past_key_values=H2OCache(model, budget=0.2))`: heavy hitters and recent tokens.

    A prompt in one forward is attended to in full and then pruned; read it in chunks (`prefill_chunk_size=8192`) to
    hold the budget and one chunk at a time. While tokens are generated, each adds to the scores of what it attended to.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens kept per KV head; a float is a share of the row's real tokens, see `caches.budget.Budget`.
        recent: the newest tokens, always kept: how many, or as a float which share of the budget beside the sinks (the
            paper's half).
        num_sinks: the row's first real tokens, always kept.
        score: "sum" of the attention given so far (the paper); "mean": divided by how many queries could have given
            any; "decay": each step's older sums count `decay` to the power of the step's queries.
        decay: of score="decay".
        group: how the query heads of a KV head are put together: "sum", "mean" or "max".
        grace: where it is more than `recent`, so many of the newest tokens are not judged either, while they fit: their
            sums are young.
        evict_every: tokens between two compactions while generating; default a 32nd of the budget, at most 256.
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".
        compiled: generate in buffers that never move: on a GPU `generate` then compiles the decode step, once, and
            replays it as a CUDA graph. The same is kept as without: what goes does so between two steps. Read long
            prompts by `cache.read(ids, chunk=8192)` before: `prefill_chunk_size` would compile the chunks too. Not with
            codecs "int4" and "bf16", nor on layers with a pattern.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: options out of range.
    """

    chunks_differ = "a chunk does not see what was evicted before it, nor does it score it"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float = 0.2,
        *,
        recent: int | float = 0.5,
        num_sinks: int = 4,
        score: str = "sum",
        decay: float = 0.99,
        group: str = "sum",
        grace: int = 0,
        evict_every: int | None = None,
        codec: str | None = None,
        compiled: bool = False,
    ) -> None:
        kept = Budget(budget, num_sinks, recent, evict_every)
        for name, value, choices in (("score", score, SCORES), ("group", group, GROUPS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if not isinstance(decay, Real) or not 0 < decay < 1:
            raise ValueError(f"decay={decay!r} must lie between 0 and 1")
        check_integer("grace", grace, 0)

        def make(index: int) -> H2OLayer:
            return H2OLayer(kept, codec, compiled, score=score, decay=decay, group=group, grace=grace)

        super().__init__(layers=routed_layers(model, "H2OCache", make, compiled))

    def stats(self, measure: bool = False) -> dict[str, Any]:
        """Besides what every cache says:

        `mass_kept`: of all the attention that tokens were given so far (`group` puts query heads together), the share
        that tokens which are still kept were given; the mean over layers, rows and KV heads, and `mass_kept_by_layer`.
        Each query gave its attention to what was kept when it came. So this is not the share of full attention that a
        token sees now: what is gone was given nothing since, and could be what the next token would look for. It falls
        with what is evicted and rises with every token after that, up to 1. None before the first token, and for
        score="decay", whose sums forget.
        """
        told = super().stats(measure)
        shares = {n: layer.mass_kept() for n, layer in enumerate(self.layers) if isinstance(layer, H2OLayer)}
        by_layer = {n: float(x.nanmean()) for n, x in shares.items() if x is not None}
        mean = sum(by_layer.values()) / len(by_layer) if by_layer else None
        return {**told, "mass_kept": mean, "mass_kept_by_layer": by_layer}


class H2OLayer(FixedSlots, EvictingLayer):
    """One layer: the attention that each kept token was given so far, in fp32."""

    owner = "H2OCache"
    fields: ClassVar = {"mass": torch.float32}
    wants_scores = True

    def __init__(
        self,
        budget: Budget,
        codec: str | None,
        fixed: bool = False,
        *,
        score: str,
        decay: float,
        group: str,
        grace: int,
    ) -> None:
        super().__init__(budget, codec, fixed)
        self.kind, self.decay, self.group, self.grace = score, decay, group, grace

    def _clear(self) -> None:
        super()._clear()
        self.gone: Tensor | None = None  # fp32 [B, K, 1]: what evicted tokens had been given

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.gone = torch.zeros(*key_states.shape[:2], 1, device=self.device)

    def observe(self, step: Step) -> None:
        """Add what the step's queries gave."""
        mass = self.slots["mass"]
        if self.kind == "decay":
            mass *= self.decay**step.num_queries
        mass += self._given(step)

    def _given(self, step: Step) -> Tensor:
        if step.scores is not None:
            by_head = (step.scores - step.lse).exp().unflatten(1, (self.num_kv_heads, -1))
            return self._grouped(by_head)
        keys = self.keys_like(step.query)
        if scattered.is_dense(step.spec):
            how = {"scale": step.scale, "softcap": step.softcap, "impl": kernel_impl(step.impl)}
            bounds = self.bounds(step.num_queries)
            return attn_mass(step.query, keys, step.lse, bounds=bounds, reduce=self.group, **how)
        kept = scattered.Keys(keys, None, self.key_positions(), None)
        by_head = scattered.mass(self.queries_of(step), kept, step.lse)
        return self._grouped(by_head)

    def _grouped(self, by_head: Tensor) -> Tensor:
        """[B, K, G, slots] of the query heads of a KV head -> [B, K, slots]."""
        return {"sum": by_head.sum, "mean": by_head.mean, "max": by_head.amax}[self.group](2)

    def score(self) -> Tensor:
        worth = self.slots["mass"]
        position = self.slots["position"]
        if self.kind == "mean":
            worth = worth / (self.seen - position)  # the token itself and all after it could give
        if self.grace:
            worth = worth.masked_fill(position >= self.seen - self.grace, torch.finfo(torch.float32).max)
        return worth

    def evict(self, targets: list[int]) -> None:
        before = self._held(self.counts)
        super().evict(targets)
        self.gone = self.gone + before - self._held(targets)

    def mass_kept(self) -> Tensor | None:
        """[B, K]: the share of what was given so far that kept tokens were given; NaN for a row without tokens."""
        self.leave_fixed()
        if not self.is_initialized or self.kind == "decay":
            return None
        held = self._held(self.counts)
        return (held / (held + self.gone))[..., 0]

    def _held(self, counts: list[int]) -> Tensor:
        """What the last `counts[r]` slots of every row were given, [B, K, 1]."""
        mass = self.slots["mass"]
        first = mass.shape[2] - self._column(counts)
        return mass.masked_fill(torch.arange(mass.shape[2], device=self.device) < first, 0).sum(-1, keepdim=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.is_initialized:
            self.gone = self.gone[to_list(indices)]

    def memory(self) -> int:
        return super().memory() + (0 if self.gone is None else self.gone.untyped_storage().nbytes())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = super().state()
        return {**tensors, "gone": self.gone}, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        gone = {name: x for name, x in tensors.items() if name == "gone"}
        super().load_state({name: x for name, x in tensors.items() if name != "gone"}, numbers, like)
        self.gone = fitting(gone, {"gone": self.gone[:1]}, len(self.pads), 1)["gone"]
