"""Generating under a fixed budget with tensors that never move: a step that compiles, and that a CUDA graph can replay.

Each row has one slot more than its budget. A new token overwrites the slot of the token that was worth least after the
step before, so a step attends to the budget and itself, as where the least is evicted after every step: the tokens are
the same ones, in another order, which attention to single tokens does not see. A layer that merges instead fills the
row, which is made room in between two steps. What changes from step to step lies in tensors, what the host knows stays
as it is; `ordered` gives sorted slots back for whatever comes next.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..hf.layers import state_of
from .slots import Slots

if TYPE_CHECKING:
    from .evicting import EvictingLayer

BLOCK = 256  # slots among which one program looks for the least: 100 blocks a KV head of 128K tokens, a fifth kept
WHOLE = 8 * BLOCK  # from here on a row is whole blocks, at most an eighth more: looking for the least needs no padding
MOST = torch.iinfo(torch.int64).max


def room(most: int) -> int:
    """Slots of a row: for `most` tokens, and the one that overflows them."""
    return most + 1 if most < WHOLE else -(-(most + 1) // BLOCK) * BLOCK


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

    It outlives the time that it is used in: who enters it again finds the same tensors, so that what was compiled or
    recorded for their addresses holds. What a layer keeps lies in them all the while, or they are let go of.
    """

    def __init__(self, layer: EvictingLayer) -> None:
        rows, device = len(layer.pads), layer.device
        self.size = _size(layer)
        self.slots = Slots({}, 0)
        self.limit, self.pads, self.sinks, self.recent = (
            torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(4)
        )
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.span = torch.zeros(rows, 2, dtype=torch.int32, device=device)  # 0, and how many slots are filled
        self.hole = torch.zeros(rows, layer.num_kv_heads, dtype=torch.int64, device=device)  # where the next token goes
        self.replaces, self.added_to = layer.replaces, layer.added_to
        for x in vars(self).values():
            if isinstance(x, Tensor):
                torch._dynamo.mark_static_address(x)

    @property
    def live(self) -> Tensor:
        """int32 [B], slots filled: a view, since each tensor that a step changes costs it a kernel."""
        return self.span[:, 1]

    def fits(self, layer: EvictingLayer) -> bool:
        """Whether `layer`, as it is now, can enter."""
        return len(self.span) == len(layer.pads) and self.size == _size(layer)

    def holds(self, slots: Slots) -> bool:
        """Whether `slots` lie in these tensors."""
        ours, theirs = self.slots.tensors.get("keys"), slots.tensors.get("keys")
        return ours is not None and theirs is not None and ours.data_ptr() == theirs.data_ptr()

    def enter(self, layer: EvictingLayer) -> None:
        """Take over what `layer` keeps.

        Args:
            layer: settled, so that no row holds more than its budget.
        """
        slots, counts = layer.slots, torch.tensor(layer.counts, dtype=torch.int32)
        into = self.slots if self.slots.tensors else slots
        if into.capacity == self.size and not into.borrowed and self._to_the_left(layer, into):
            self.slots = Slots(into.tensors)
        else:
            place = torch.arange(self.size)
            source = (slots.length - counts[:, None] + place).clamp(max=max(slots.length - 1, 0)).to(layer.device)
            self.slots = slots.take(source[:, None].expand(-1, layer.num_kv_heads, -1), self.size, into=into)
        for x in self.slots.tensors.values():
            torch._dynamo.mark_static_address(x)
        sinks, recent = zip(*(layer.budget.protected(most) for most in layer.budgets), strict=True)
        numbers = (counts, torch.tensor(layer.budgets) + 1, layer.pads, sinks, recent)
        for x, values in zip((self.live, self.limit, self.pads, self.sinks, self.recent), numbers, strict=True):
            x.copy_(torch.as_tensor(values))
        self.seen.fill_(layer.seen)
        self.hole.copy_(self.live[:, None])

    def _to_the_left(self, layer: EvictingLayer, into: Slots) -> bool:
        """Whether every row already lies where it should, in the tensors that it should be in."""
        return layer.slots.tensors["keys"] is into.tensors["keys"] and min(layer.counts) == layer.slots.length

    def put(self, new: dict[str, Tensor]) -> None:
        """Write one token a row, given as slots [B, K, 1, …], over the one that is worth least."""
        place = torch.arange(self.size, device=self.hole.device)
        for name, x in new.items():
            if name in self.added_to:
                self.slots.tensors[name].masked_fill_(place == self.hole[..., None], 0)
            else:
                self.write(name, self.hole[..., None], x)
        self.live.copy_(torch.minimum(self.live + 1, self.limit))
        self.seen.add_(1)

    def write(self, name: str, place: Tensor, x: Tensor) -> None:
        """Write x [B, K, N, …] to the slots `place` [B, K, N], which may be one for all rows or heads.

        By index: what else could be said so (`scatter_`, a slice), inductor does to a copy of the whole buffer.
        """
        row = torch.arange(x.shape[0], device=x.device)[:, None, None]
        head = torch.arange(x.shape[1], device=x.device)[:, None]
        self.slots.tensors[name][row, head, place] = x

    def over_the_least(self, worth: Tensor) -> None:
        """The next token goes over the least of `worth` fp32 [B, K, slots] in a full row, else behind the last."""
        live, pads, sinks, recent = (x[:, None, None] for x in (self.live, self.pads, self.sinks, self.recent))
        place, position = torch.arange(self.size, device=worth.device), self.slots["position"]
        safe = (position < pads + sinks) | (position >= self.seen - recent) | (place >= live)
        # Equal worth: the older token stays, as in `EvictingLayer.best`; later slots may hold older tokens here.
        self._next(_first_least(_key(worth, -position).masked_fill(safe, MOST)))

    def over_the_oldest(self) -> None:
        """The next token goes over the oldest one that is no sink. Rows were in order when they entered."""
        last = (self.limit - 1)[:, None]
        self._next(torch.where(self.hole >= last, self.sinks[:, None], self.hole + 1))

    def behind_the_last(self) -> None:
        """The next token goes behind the last one, for which a full row must be made room first."""
        self.hole.copy_(self.live[:, None])

    def _next(self, hole: Tensor) -> None:
        self.hole.copy_(torch.where((self.live == self.limit)[:, None], hole, self.live[:, None]))

    def kept(self) -> list[int]:
        """Tokens kept in each row; not counting one that the next will replace."""
        return (self.live.minimum(self.limit - 1) if self.replaces else self.live).tolist()

    def filled(self, slots: Slots) -> Slots:
        """`slots`, copied into these tensors."""
        for name, x in self.slots.tensors.items():
            x[:, :, : slots.length] = slots[name]
        return Slots(self.slots.tensors, slots.length)

    def ordered(self) -> tuple[Slots, list[int], int]:
        """`(slots, tokens a row, tokens seen)`: what is kept, in these tensors, sorted and filled to the right."""
        place = torch.arange(self.size, device=self.live.device)
        gone = place >= self.live[:, None, None]
        counts = self.live
        if self.replaces:
            full = self.live == self.limit
            gone = gone | (full[:, None, None] & (place == self.hole[..., None]))
            counts = torch.where(full, self.live - 1, self.live)
        elif int(counts.min()) == int(counts.max()):  # nothing was replaced, so all is in order
            return Slots(self.slots.tensors, int(counts[0])), counts.tolist(), int(self.seen)
        order = self.slots["position"].masked_fill(gone, -1).argsort(dim=-1, stable=True)
        most = int(counts.max())
        index = order[..., order.shape[-1] - most :]
        index = torch.where(torch.arange(most, device=place.device) >= most - counts[:, None, None], index, -1)
        return self.slots.take(index, self.size, into=self.slots), counts.tolist(), int(self.seen)


def _size(layer: EvictingLayer) -> int:
    return room(max(layer.budgets))


def _key(worth: Tensor, then: Tensor) -> Tensor:
    """int64 in the order of `worth` fp32, and where that is equal of `then` int32 below 1."""
    bits = worth.float().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats below 0 run the other way
    return (bits.long() << 32) | (then.long() + 0x7FFFFFFF)


def _first_least(key: Tensor) -> Tensor:
    """`key.argmin(-1)` of int64 [B, K, S], block by block: a few long rows would leave most of a GPU idle."""
    missing = -key.shape[-1] % BLOCK
    blocks = (torch.constant_pad_nd(key, (0, missing), MOST) if missing else key).unflatten(-1, (-1, BLOCK))
    block = blocks.amin(-1).argmin(-1)
    chosen = blocks.gather(2, block[..., None, None].expand(-1, -1, 1, BLOCK))[:, :, 0]
    return block * BLOCK + chosen.argmin(-1)


class FixedDecoding:
    """The part of an `EvictingLayer` that enters and leaves fixed buffers: entered when a mask for one token is asked
    for, which `generate` does ahead of a step; left by whatever needs the tokens in order."""

    fixed: FixedSlots | None = None  # instead of `slots`, `counts` and `seen` while it generates
    added_to: ClassVar[tuple[str, ...]] = ()  # fields that `observe` goes through: a new token's becomes 0 in passing
    replaces: ClassVar[bool] = True  # a full row's next token takes another's slot; False: `enter_fixed` makes room

    def _clear(self) -> None:
        super()._clear()
        self.fixed = None
        self._left: FixedSlots | None = None  # to be entered again, as long as `slots` lie in it

    def now(self) -> int | Tensor:
        """How many tokens were seen; for what is compared with `slots["position"]`."""
        return self.seen if self.fixed is None else self.fixed.seen

    def before_fixed_attention(self) -> None:
        """Change `fixed.slots` once the newest token lies in them; nothing here may wait for the device."""

    def choose(self) -> None:
        """Say where the next token goes, which a graph may do too."""
        self.fixed.over_the_least(self.score())

    def enter_fixed(self, seen: int) -> None:
        """Get ready for the next single token, where that is asked for and can be; never within a graph.

        Args:
            seen: tokens so far, which while it generates only the device knows.
        """
        if not self.is_compileable or self.fixed is not None or self.record_past or self._pending is not None:
            return
        began = self.budgets is not None and all(self.seen > pads for pads in self.pads)
        if not began or not self.codec.in_kernel(self.device):
            return
        self._stand_still()
        if self._left is None or not self._left.fits(self):
            self._left = FixedSlots(self)
        self._enter(self._left)

    def _enter(self, fixed: FixedSlots) -> None:
        fixed.enter(self)
        self.fixed, self._left = fixed, None
        self.slots, self._span = fixed.slots, None

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
        full = any(count >= most for count, most in zip(self.counts, self.budgets, strict=True))
        if full and self.replaces:
            self.intact = min(self.intact, *(self.budget.protected(b)[1] for b in self.budgets))
        self.fixed, self._left = None, self.fixed

    def _return(self) -> None:
        """Where what is kept has moved elsewhere, take it back or let the old tensors go: nothing is held twice."""
        left = self._left
        if left is None or left.holds(self.slots):
            return
        if left.fits(self) and self.slots.length <= left.size:
            self.slots = left.filled(self.slots)
        else:
            self._left = None

    def get_seq_length(self) -> int:
        return self.now() if torch.compiler.is_compiling() else int(self.now())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.fixed is not None and torch.compiler.is_compiling():
            return self.slots.capacity, 0  # a fixed step asks no mask, and nothing may be read back here
        # One key more than there is, so that no mask is left out as needless: made ahead, it stays out of the graph.
        return self.get_seq_length() + query_length + (self.fixed is not None), 0
