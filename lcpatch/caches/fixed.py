"""Generating under a fixed budget with tensors that never move: a step that compiles, and that a CUDA graph can replay.

Each row has one slot more than its budget. A new token overwrites the slot of the token that was worth least after the
step before, so a step attends to the budget and itself, as where the least is evicted after every step: the tokens are
the same ones, in another order, which attention to single tokens does not see. What changes from step to step lies in
tensors, what the host knows stays as it is; `ordered` gives sorted slots back for whatever comes next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hf.layers import state_of
from ..hf.watch import Call
from .slots import Slots

if TYPE_CHECKING:
    from .evicting import EvictingLayer


def check_codec(codec: str | None) -> None:
    """Refuse a codec whose slots no kernel reads as they lie.

    Raises:
        ValueError: "int4" or "bf16".
    """
    if codec in ("int4", "bf16"):
        raise ValueError(f"compiled=True reads what is kept as it lies, which codec={codec!r} does not allow")


def check_layer(index: int, module: nn.Module) -> None:
    """Refuse a layer that attends by a pattern.

    Raises:
        ValueError: it does.
    """
    state = state_of(module)
    if state is not None and state.spec is not None:
        raise ValueError(f"compiled=True: layer {index} follows the pattern {state.method!r}; leave it out")


class FixedSlots:
    """The slots of a layer while it generates, filled from the left.

    Args:
        layer: settled, so that no row holds more than its budget.
    """

    def __init__(self, layer: EvictingLayer) -> None:
        device, slots = layer.device, layer.slots
        counts = torch.tensor(layer.counts, device=device)
        size = max(layer.budgets) + 1
        place = torch.arange(size, device=device)
        source = (slots.length - counts[:, None] + place).clamp(max=max(slots.length - 1, 0))
        index = source[:, None].expand(-1, layer.num_kv_heads, -1)
        self.slots = slots.take(index, size)
        self.live = counts.to(torch.int32)
        self.limit = torch.tensor(layer.budgets, dtype=torch.int32, device=device) + 1
        self.hole = counts[:, None].expand(-1, layer.num_kv_heads).contiguous()  # where the next token goes
        self.span = torch.stack([torch.zeros_like(self.live), self.live], 1)
        self.seen = torch.tensor(layer.seen, device=device)
        self.pads = torch.tensor(layer.pads, device=device)
        sinks, recent = zip(*(layer.budget.protected(most) for most in layer.budgets), strict=True)
        self.sinks, self.recent = (torch.tensor(x, device=device)[:, None, None] for x in (sinks, recent))
        for x in (*self.slots.tensors.values(), *self._moving()):
            torch._dynamo.mark_static_address(x)

    def _moving(self) -> tuple[Tensor, ...]:
        return self.live, self.limit, self.hole, self.span, self.seen, self.pads, self.sinks, self.recent

    @property
    def bounds(self) -> Tensor:
        """`attn_mass`'s bounds of the newest token over the slots, int32 [B, 1, 4]."""
        one = torch.ones_like(self.live)
        return torch.stack([one - 1, one, one - 1, self.live], 1)[:, None]

    def put(self, new: dict[str, Tensor]) -> None:
        """Write one token a row, given as slots [B, K, 1, …], over the one that is worth least."""
        for name, x in new.items():
            index = self.hole.view(*self.hole.shape, *[1] * (x.dim() - 2)).expand_as(x)
            self.slots.tensors[name].scatter_(2, index, x)
        self.live.copy_(torch.minimum(self.live + 1, self.limit))
        self.span[:, 1] = self.live
        self.seen.add_(1)

    def choose(self, worth: Tensor) -> None:
        """Where the next token goes: over the least of `worth` [B, K, slots] in a full row, else behind the last."""
        place = torch.arange(worth.shape[2], device=worth.device)
        position = self.slots["position"] - self.pads[:, None, None]
        now = (self.seen - self.pads)[:, None, None]
        safe = (position < self.sinks) | (position >= now - self.recent) | (place >= self.live[:, None, None])
        # Equal worth: the older token stays, as in `EvictingLayer.best`; later slots may hold older tokens here.
        least = worth.masked_fill(safe, torch.inf)
        least = torch.where(least == least.amin(-1, keepdim=True), position, -1)
        full = (self.live == self.limit)[:, None]
        self.hole.copy_(torch.where(full, least.argmax(-1), self.live[:, None].long()))

    def step(
        self, layer: EvictingLayer, call: Call, new: tuple[Tensor, Tensor], finish: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """One token a row through the layer: store, attend, score, choose."""
        self.put(layer._new_slots(*new, self.seen[None]))
        layer.before_fixed_attention()
        out, lse = layer._decode(call, layer.bias(), self.span)
        finish(lse)
        self.choose(layer.score())
        return out, lse

    def ordered(self) -> tuple[Slots, list[int], int]:
        """`(slots, tokens a row, tokens seen)`: what is kept, sorted by position and filled to the right."""
        place = torch.arange(self.slots.capacity, device=self.live.device)
        full = self.live == self.limit
        gone = (place >= self.live[:, None, None]) | (full[:, None, None] & (place == self.hole[..., None]))
        counts = torch.where(full, self.live - 1, self.live)
        order = self.slots["position"].masked_fill(gone, -1).argsort(dim=-1, stable=True)
        most = int(counts.max())
        index = order[..., order.shape[-1] - most :]
        index = torch.where(torch.arange(most, device=place.device) >= most - counts[:, None, None], index, -1)
        return self.slots.take(index, self.slots.capacity), counts.tolist(), int(self.seen)


class FixedDecoding:
    """The part of an `EvictingLayer` that enters and leaves fixed buffers: entered when a mask for one token is asked
    for, which `generate` does ahead of a step; left by whatever needs the tokens in order."""

    fixed: FixedSlots | None = None  # instead of `slots`, `counts` and `seen` while it generates

    def _clear(self) -> None:
        super()._clear()
        self.fixed = None

    def now(self) -> int | Tensor:
        """How many tokens were seen; for what is compared with `slots["position"]`."""
        return self.seen if self.fixed is None else self.fixed.seen

    def before_fixed_attention(self) -> None:
        """Change `fixed.slots` once the newest token lies in them; nothing here may wait for the device."""

    def enter_fixed(self) -> None:
        """Get ready for single tokens, where that is asked for and can be: nothing of it happens within a graph."""
        if not self.is_compileable or self.fixed is not None or self.record_past or self._pending is not None:
            return
        began = self.budgets is not None and all(self.seen > pads for pads in self.pads)
        if began and self.codec.in_kernel(self.device):
            self._stand_still()
            self.fixed = FixedSlots(self)
            self.slots, self._span = self.fixed.slots, None

    def _stand_still(self) -> None:
        """Buffers of one size take no budget that grows with the text."""
        if any(self.online):
            rows = {row: self.budgets[row] for row, on in enumerate(self.online) if on}
            warnings.warn(
                f"{self.owner}, compiled=True: without a prompt of several tokens a share stays what it is after the "
                f"first (row: tokens kept {rows}); give an integer budget, or a prompt",
                stacklevel=2,
            )
            self.online = [False] * len(self.online)

    def leave_fixed(self) -> None:
        """Put what is kept in order again."""
        if self.fixed is None:
            return
        before = self.seen
        self.slots, self.counts, self.seen = self.fixed.ordered()
        self.intact += self.seen - before
        if any(count >= most for count, most in zip(self.counts, self.budgets, strict=True)):
            self.intact = min(self.intact, *(self.budget.protected(b)[1] for b in self.budgets))
        self.fixed = None

    def get_seq_length(self) -> int:
        return self.now() if torch.compiler.is_compiling() else int(self.now())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.fixed is not None and torch.compiler.is_compiling():
            return self.slots.capacity, 0  # a fixed step asks no mask, and nothing may be read back here
        # One key more than there is, so that no mask is left out as needless: made ahead, it stays out of the graph.
        return self.get_seq_length() + query_length + (self.fixed is not None), 0
