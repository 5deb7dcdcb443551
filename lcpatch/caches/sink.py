"""StreamingLLM's cache: the first tokens and a window of the newest, endless generation at fixed memory.

Source: arXiv 2309.17453 (section 3.2). Attention mass sits on the first tokens whatever they say ("attention sinks"): a
window alone collapses once they leave it, 4 sinks beside it hold perplexity. It is no longer context: what leaves the
window is forgotten.

Positions count within the cache, as in the paper ("rolling"): a query sees the sinks right before its window. Only
distances matter to rotary embeddings, and those within the window are right as they are, so nothing but the sinks is
turned: from their first rotation, by as many positions as the row has lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hf.models import attention_modules, full_attention_layers, unwrap
from ..hf.rotation import Rotation, rotations_of
from ..hf.watch import Call
from .budget import Budget
from .cache import LongCache, caches, routed_layers
from .evicting import EvictingLayer
from .fixed import Steps
from .fixed_slots import FixedSlots
from .rows import to_list
from .untrusted import fitting, wholes

POSITIONS = ("rolling", "absolute")


@caches.register("sink")
class SinkCache(LongCache):
    """`model.generate(**inputs, past_key_values=SinkCache(model, budget=1024))`: sinks and the newest tokens.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens kept per KV head, sinks included; a float is a share of the prompt's tokens.
        num_sinks: the row's first real tokens, kept for ever.
        positions: "rolling": within the cache (the paper), for RoPE of type default, linear, llama3 or yarn;
            "absolute": in the whole text, so that sinks move away and quality ends with the trained length.
        compiled: generate in buffers that never move, as in `H2OCache`.
        evict_every: tokens between two compactions while generating, by which the window is shorter at times; default
            a 32nd of the budget, at most 256.
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer; with
            "rolling", RoPE that depends on the length, or no RoPE.
        ValueError: options out of range.
    """

    chunks_differ = "a chunk does not see what left the window before it"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float = 1024,
        *,
        num_sinks: int = 4,
        positions: str = "rolling",
        evict_every: int | None = None,
        codec: str | None = None,
        compiled: bool = False,
    ) -> None:
        kept = Budget(budget, num_sinks, evict_every=evict_every)
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is not one of {', '.join(map(repr, POSITIONS))}")
        turns: dict[int, Rotation] = {}
        if positions == "rolling" and num_sinks > 0:
            base = unwrap(model)
            modules = attention_modules(base)
            full = {index: modules[index] for index in full_attention_layers(base.config, modules)}
            turns = rotations_of(base, full, "SinkCache") if full else {}

        def make(index: int) -> SinkLayer:
            return SinkLayer(kept, codec, compiled, turn=turns.get(index))

        super().__init__(layers=routed_layers(model, "SinkCache", make, compiled))


class SinkLayer(FixedSlots, EvictingLayer):
    """One layer: what is neither sink nor recent goes.

    Args:
        turn: how to turn the sinks on; None: they stay where they were in the text.
    """

    owner = "SinkCache"

    def __init__(
        self, budget: Budget, codec: str | None = None, fixed: bool = False, *, turn: Rotation | None = None
    ) -> None:
        self.turn = turn
        super().__init__(budget, codec, fixed)

    def _clear(self) -> None:
        super()._clear()
        self.lost: list[int] = []  # per row: tokens evicted when its sinks were turned last
        self.first: Tensor | None = None  # [B, K, sinks, D]: the sinks' keys as they came

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.lost = [0] * len(self.pads)
        self.first = None

    def score(self) -> Tensor:
        return self.slots["position"].double()  # fp32 counts to 16 million

    def attention(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.turn is not None:
            self._turn_sinks()
        return super().attention(call, keys, values)

    def _lay_out(self, steps: Steps) -> None:
        if self.turn is not None:  # a row loses nothing while it generates, so once will do
            self._turn_sinks()
        super()._lay_out(steps)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.is_initialized:
            rows = to_list(indices)
            self.lost = [self.lost[r] for r in rows]
            self.first = None if self.first is None else self.first[rows]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = super().state()
        return tensors | ({} if self.first is None else {"first": self.first}), numbers | {"lost": self.lost}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        first = {name: x for name, x in tensors.items() if name == "first"}
        super().load_state({name: x for name, x in tensors.items() if name != "first"}, numbers, like)
        self.lost = wholes(numbers, "lost", len(self.pads), self.seen)
        if first or any(self.lost):
            self.first = fitting(first, {"first": like}, len(self.pads), self.budget.num_sinks)["first"]

    def memory(self) -> int:
        return super().memory() + (0 if self.first is None else self.first.untyped_storage().nbytes())

    def _turn_sinks(self) -> None:
        """Put the sinks of every row right before what it still has."""
        lost = [max(self.seen - pads, 0) - count for pads, count in zip(self.pads, self.counts, strict=True)]
        if lost == self.lost:
            return
        num = self.budget.num_sinks
        start = self.slots.length - torch.tensor(self.counts, device=self.device)
        place = (start.clamp(max=self.slots.length - num)[:, None] + torch.arange(num, device=self.device))[:, None]
        # A row that lost nothing may have fewer: it is left alone below.
        place = place.expand(-1, self.num_kv_heads, -1)
        keys = self.keys_like(torch.empty(0, dtype=self.dtype, device=self.device))
        now = keys.gather(2, place[..., None].expand(-1, -1, -1, keys.shape[3]))
        self.first = now.clone() if self.first is None else self.first
        new = [r for r, (before, after) in enumerate(zip(self.lost, lost, strict=True)) if after and not before]
        self.first[new] = now[new]
        moved = [r for r, (before, after) in enumerate(zip(self.lost, lost, strict=True)) if before != after]
        turned = self.turn(self.first[moved], torch.tensor(lost, device=self.device)[moved])
        for suffix, part in self.codec.encode(turned).items():
            target = self.slots.tensors["keys" + suffix]
            for row, x in zip(moved, part, strict=True):
                target[row].scatter_(1, place[row].view(*place[row].shape, *[1] * (x.dim() - 2)).expand_as(x), x)
        self.lost = lost
