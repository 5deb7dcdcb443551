"""Generating over slots with tensors that never move.

A token goes behind the last one, to the same slot in every row, since rows are filled to the right. Whoever is over the
budget then is made room in by `EvictingLayer.evict`, between two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hf.watch import Call
from .budget import Budget
from .fixed import FixedLayer, Steps, still
from .slots import Slots
from .step import step_of

ALIGNED = 16  # slots: rows of fp32 that begin at whole 64 bytes are read in wide loads


def room(most: int) -> int:
    """Slots of a row: for `most` tokens, and the one that overflows them."""
    return -(-(most + 1) // ALIGNED) * ALIGNED


class FixedSlots(FixedLayer):
    """The part of an `EvictingLayer` that generates in buffers which outlive that time.

    Who enters again finds the same tensors, so what was compiled or recorded for their addresses holds. What a layer
    keeps lies in them in between too, or they are let go of.

    Args:
        budget, codec: as of every such layer.
        fixed: whether it ever does.

    Raises:
        ValueError: a codec whose slots no kernel reads as they lie.
    """

    def __init__(self, budget: Budget, codec: str | None = None, fixed: bool = False) -> None:
        super().__init__(budget, codec, fixed=fixed)
        if fixed and not self.codec.in_kernel:
            raise ValueError(f"compiled=True reads what is kept as it lies, which codec={codec!r} does not allow")

    def _clear(self) -> None:
        super()._clear()
        self._home: dict[str, Tensor] | None = None

    def can_enter(self) -> bool:
        """Whether every row has begun, and steps are not recorded."""
        if self.budgets is None or self.record_past:
            return False
        return all(self.seen > pads for pads in self.pads)

    def _lay_out(self, steps: Steps) -> None:
        """The slots of the next tokens; until it leaves, `slots` are all of them."""
        self._return()
        if self._home is None:
            if self.slots.borrowed or self.slots.capacity != self._size():
                self.slots = self.slots.owned(self._size())
            self._home = self.slots.tensors
            still(*self._home.values())
        filled, size = self.slots.length, self.slots.capacity
        self._home["position"][:, :, filled:] = torch.arange(self.seen, self.seen + size - filled, device=self.device)
        for name in self.fields:
            self._home[name][:, :, filled:] = 0
        fewest = min(most - count for count, most in zip(self.counts, self.budgets, strict=True))
        self._until = self.seen + fewest + 1
        self.slots = Slots(self._home)

    def _take_back(self, taken: int) -> None:
        """Count what is kept, and evict what is over the budget."""
        self.counts = [count + taken for count in self.counts]
        self.intact += taken
        self.slots = self._buffers = Slots(self._home, max(self.counts))
        self._span = None
        self._shrink(several=False)
        self._buffers = None
        self._return()

    def _return(self) -> None:
        """Where what is kept has moved elsewhere, take it back or let the old tensors go: nothing is held twice.

        They go too where a later turn's budget fills them, and left no room for the token that overflows it.
        """
        if self._home is None:
            return
        home = self._home["keys"]
        if home.data_ptr() == self.slots.tensors["keys"].data_ptr():
            if home.shape[2] < self._size():
                self._home = None
        elif (len(home), home.shape[2]) == (len(self.pads), self._size()) and self.slots.length <= self._size():
            for name, x in self._home.items():
                x[:, :, : self.slots.length] = self.slots[name]
            self.slots = Slots(self._home, self.slots.length)
        else:
            self._home = None

    def _size(self) -> int:
        return room(max(self.budgets))

    def _room(self, most: int) -> int:
        return room(most) if self.is_compileable else super()._room(most)

    def _fixed_step(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row: store, attend, score."""
        steps, tensors = self.steps, self.slots.tensors
        for name, x in self._encoded(keys, values).items():
            # By index: what else could be said so (`scatter_`, a slice), inductor does to a copy of the whole buffer.
            tensors[name][:, :, steps.last()] = x
        out, lse, *scores = self._decode(call, self.bias(), steps.span, self.wants_scores)
        self.observe(step_of(call, lse, *scores))
        return out, lse

    def _settle(self, cropped: bool = False) -> None:
        super()._settle(cropped)
        self._return()

    def activate_past_recording(self) -> None:
        self.leave_fixed()
        super().activate_past_recording()
