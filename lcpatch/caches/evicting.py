"""The eviction contract: a layer that keeps a budget of tokens per (row, KV head), and a method that says which.

What holds for every method, whatever the schedule:

1. Positions and masks are those of the whole sequence: `get_seq_length` counts tokens seen, never what is stored.
2. A step attends to everything kept and to itself, and evicts afterwards: a prefill sees its whole chunk.
3. Survivors stay sorted by position. Pads are never stored, so they go before any token; sinks are the first real ones.
4. A row's result does not depend on the rows beside it: counts, budgets and the moment of eviction are per row.
5. Every KV head of a row keeps the same number of tokens, each head its own.
6. While a step may still be taken back (`activate_past_recording`), its tokens and what they would evict wait for
   `crop`, or for the next step: memory stays bounded even where nobody crops. A token that follows a step which nobody
   cropped ends that, for transformers' assisted decoding leaves it on.

Because the layer attends by itself (`hf.watch`), no mask of transformers' is involved.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hf.watch import Call
from .budget import Budget
from .layer import negative
from .rows import to_list
from .slots import GRAIN, Slots, grown, most_room
from .slotted import SlottedLayer
from .step import Step, step_of
from .untrusted import fitting, whole, wholes


class EvictingLayer(SlottedLayer):
    """Keeps at most a budget of tokens for every (row, KV head).

    A method overrides what it decides:

        fields    names and dtypes of what it knows about each kept token, [B, K, capacity], moved along with it
        observe   update those after a step's attention
        score     how much each kept token is worth; the lowest go
        evict     instead of `score`: make every row's count its target some other way (merging)
        bias      what is added to a kept key's scores (the log of the tokens that it stands for)

    Args:
        budget: how much is kept.
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".
    """

    wants_scores: ClassVar[bool] = False

    def __init__(self, budget: Budget, codec: str | None = None) -> None:
        self.budget = budget
        super().__init__(codec)

    def _clear(self) -> None:
        super()._clear()
        self.budgets: list[int] | None = None  # per row, once a step has come
        self.online: list[bool] = []  # per row: whether its budget is of the tokens seen so far, for want of a prompt
        self.intact = 0  # so many of the newest tokens are stored one by one in every row
        self.record_past = False
        self._pending: Step | None = None  # a step that nothing was evicted after yet
        self._buffers: Slots | None = None  # buffers from before that step, to be filled again

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.online = [self.budget.is_share] * key_states.shape[0]

    # What a method decides.

    def observe(self, step: Step) -> None:
        """Update `slots` fields after the attention of `step`, whose keys are the last ones stored."""

    def score(self) -> Tensor:
        """[B, K, slots]: the tokens with the highest are kept. Sinks and recent tokens are kept whatever it says."""
        raise NotImplementedError

    def evict(self, targets: list[int]) -> None:
        """Make row r keep `targets[r]` of its `counts[r]` tokens, sorted, its sinks and recent ones among them."""
        self.keep(self.best(targets))

    # What it may use for that.

    def best(self, targets: list[int]) -> Tensor:
        """The slots [B, K, most] of the `targets[r]` tokens with the highest scores, sorted; -1 in front where a row
        keeps fewer. Equal scores: the older token stays."""
        length, device = self.slots.length, self.device
        place = torch.arange(length, device=device)
        first = length - self._column(self.counts)
        sinks, recent = zip(*(self.budget.protected(b) for b in self.budgets), strict=True)
        safe = (place < first + self._column(sinks)) | (place >= length - self._column(recent))
        worth = self.score().masked_fill(safe, torch.inf).masked_fill(place < first, -torch.inf)
        most = max(targets)
        order = worth.argsort(dim=-1, descending=True, stable=True)[..., :most]
        rank = torch.arange(most, device=device)
        return torch.where(rank < self._column(targets), order, -1).sort(-1).values

    def keep(self, index: Tensor) -> None:
        """Keep the slots `index` [B, K, M], -1 for none."""
        self.slots = self.slots.take(index, self._capacity(index.shape[2]), into=self._buffers)

    # The protocol with the attention function.

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries over what is kept and the step itself; see `hf.watch.Call`."""
        keys, values = self._begin(call)
        num = keys.shape[2]
        if num == 1:
            self.keep_last_step()
        self._settle()
        self._buffers = self.slots
        new = self._new_slots(keys, values)
        if self.slots.length and (num == 1 or self.slots.length + num <= self.slots.capacity):
            self.slots.append(new, self._capacity(self.slots.length + num))
        else:
            self.slots = self.slots.extended(new)
        real = [min(num, max(self.seen + num - pads, 0)) for pads in self.pads]
        self.counts = [count + n for count, n in zip(self.counts, real, strict=True)]
        self.seen += num
        self.intact += num
        if num > 1 or min(real) == 0:
            self._span = None
        elif self._span is not None:
            self._span[:, 1] += 1
        out, lse = self.attention(call, keys, values)
        self._pending = step_of(call, lse)
        if not self.record_past:
            self._settle()
        return out, lse

    # What may happen to a step afterwards.

    def keep_last_step(self) -> None:
        """Hear that a token follows the last step: if nobody cropped that, who records steps has gone."""
        if self._pending is not None:
            self.record_past = False
            self._settle()

    def activate_past_recording(self) -> None:
        """Let the last step be cropped: evict after it only in `crop`, or when the next comes, until nobody does."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, and evict what a recorded step would have evicted.

        Raises:
            ValueError: some of them are not stored one by one any more.
        """
        num = -negative(tokens_to_remove)
        if not self.is_initialized:
            return
        num = min(num, self.seen)
        if num > self.intact:
            raise ValueError(
                f"crop({-num}): {self.owner} holds only the last {self.intact} tokens one by one; give more `recent` "
                "tokens than are ever taken back"
            )
        if num:
            if self._pending is not None:
                left = self._pending.num_queries - num
                self._pending = self._pending.without_last(num) if left > 0 else None
            self.slots.length = max(self.slots.length - num, 0)
            self.counts = [max(count - num, 0) for count in self.counts]
            self.seen -= num
            self.intact -= num
            self._span = None
            if self.seen == 0:
                self.pads = [0] * len(self.pads)
                self.online = [self.budget.is_share] * len(self.pads)
        self._settle(cropped=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = to_list(indices)
        index = torch.as_tensor(rows, device=self.device)
        self.slots = self.slots.rows(index)
        self.pads, self.counts = [self.pads[r] for r in rows], [self.counts[r] for r in rows]
        self.online = [self.online[r] for r in rows]
        self.budgets = None if self.budgets is None else [self.budgets[r] for r in rows]
        self._pending = None if self._pending is None else self._pending.rows(index)
        self._buffers = self._span = None
        if self._pending is None:  # which else is of more queries than slots
            self._trim()

    def kept_of_rows(self) -> list[tuple[int, int]]:
        """`(kept per KV head, seen)` of each row, in tokens that are no pads."""
        return [(count, max(self.seen - pads, 0)) for count, pads in zip(self.counts, self.pads, strict=True)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        self._settle()
        names = ("seen", "pads", "counts", "budgets", "intact")
        if self.budgets is None:  # all that came was taken back before anything was settled
            self._count(True, 0)
        most = max(most_room(self.slots.length), self._room(max(self.budgets)))  # a crop may leave more
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {"online": [int(on) for on in self.online], "capacity": min(self.slots.capacity, most)}
        return {name: self.slots[name] for name in self.slots.tensors}, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of such a layer gave; `like` is an empty tensor [1, K, 0, D] as the model's keys.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        pads = wholes(numbers, "pads")
        rows, seen = len(pads), whole(numbers, "seen")
        counts, budgets = wholes(numbers, "counts", rows, seen), wholes(numbers, "budgets", rows)
        if min(budgets) < self.budget.least:
            raise ValueError(f"budgets={budgets} must each be at least {self.budget.least}")
        length = max(counts)
        self.lazy_initialization(like.expand(rows, -1, -1, -1), like)
        likes = self._new_slots(like, like)
        found = fitting(tensors, likes, rows, length)
        capacity = whole(numbers, "capacity", max(most_room(length), self._room(max(budgets))))
        self.slots = Slots(found).owned(capacity)
        self.seen, self.pads, self.counts, self.budgets = seen, pads, counts, budgets
        self.intact = whole(numbers, "intact", seen)
        self.online = [bool(on) for on in wholes(numbers, "online", rows, 1)]

    # Storing.

    def _settle(self, cropped: bool = False) -> None:
        """Let the method see the last step, and evict what is over the budget.

        Who `crop`s after a step guesses tokens and checks them (assisted decoding): what is left is no prompt. That
        steps are recorded says less, for nobody tells when it ends.
        """
        step, self._pending = self._pending, None
        if step is None:
            self._trim()  # of a batch that lost its longest row, a step was taken back
            return
        self.observe(step)
        several = step.num_queries > 1
        anew = self.budgets is None or (several and not cropped)
        if anew or any(self.online):
            self._count(anew, step.num_queries)
        self._trim()
        if not self._shrink(several) and self.slots.borrowed:
            self.slots = self.slots.owned(min(self.slots.length + GRAIN, self._capacity(self.slots.length)))
        self._buffers = None

    def _trim(self) -> None:
        """Let go of slots in front that no row fills any more, or yet: where all rows begin with pads."""
        if (filled := max(self.counts)) < self.slots.length:
            self.slots, self._span = self.slots.last(filled), None

    def _shrink(self, several: bool) -> bool:
        """Evict what is over the budget after a step of one token or `several`; whether anything was."""
        targets = [
            count if count <= most else most if several else most - self.budget.slack(most) + 1
            for count, most in zip(self.counts, self.budgets, strict=True)
        ]
        if targets == self.counts:
            return False
        self.evict(targets)
        self.counts, self._span = targets, None
        self.intact = min(self.intact, *(self.budget.protected(b)[1] for b in self.budgets))
        return True

    def _count(self, anew: bool, num: int) -> None:
        """Set the budgets after a step of `num` tokens, of all rows or of those that still count."""
        real = [self.seen - pads for pads in self.pads]
        budgets = [self.budget.of(n) for n in real]
        if not anew:
            budgets = [now if on else old for now, on, old in zip(budgets, self.online, self.budgets, strict=True)]
        self.budgets = budgets
        self.online = [on and min(num, n) < 2 for on, n in zip(self.online, real, strict=True)]

    def _capacity(self, needed: int) -> int:
        """Slots to reserve where `needed` are filled: never more than the budget and the token that overflows it (and
        what fills a block), while that stands still."""
        still = self.budgets is not None and not any(self.online)
        return grown(needed, self._room(max(self.budgets)) if still else None)

    def _room(self, most: int) -> int:
        """Slots to have for `most` tokens, and the one that overflows them."""
        return most + 1
