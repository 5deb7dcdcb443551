"""The eviction contract: a layer that keeps a budget of tokens per (row, KV head), and a method that says which.

What holds for every method, whatever the schedule:

1. Positions and masks are those of the whole sequence: `get_seq_length` counts tokens seen, never what is stored.
2. A step attends to everything kept and to itself, and evicts afterwards: a prefill sees its whole chunk.
3. Survivors stay sorted by position. Pads are never stored, so they go before any token; sinks are the first real ones.
4. A row's result does not depend on the rows beside it: counts, budgets and the moment of eviction are per row.
5. Every KV head of a row keeps the same number of tokens, each head its own.
6. While a step may still be taken back (`activate_past_recording`), its tokens and what they would evict wait for
   `crop`, or for the next step: memory stays bounded even where nobody crops.

Because the layer attends by itself (`hf.watch`), no mask of transformers' is involved.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec

from ..hf.watch import Call, attend
from . import scattered
from .budget import Budget
from .codec import BFloat16, Plain, codec_named
from .fixed import FixedDecoding, room
from .layer import AttendingLayer, decode, negative, to_list
from .slots import GRAIN, Slots, grown, most_room
from .state import fitting, whole, wholes


class Step(NamedTuple):
    """A step whose attention is done: its queries [B, H, T, D], their lse [B, H, T], and how they attended.

    `scores` [B, H, slots] of a single query, -inf for empty slots, where the layer `wants_scores` and got them along
    with the attention.
    """

    query: Tensor
    lse: Tensor
    spec: BlockSparseSpec
    scale: float | None
    softcap: float | None
    impl: str
    scores: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    def without_last(self, num: int) -> Step:
        end = self.num_queries - num
        return self._replace(query=self.query[:, :, :end], lse=self.lse[:, :, :end])

    def rows(self, index: Tensor) -> Step:
        index = index.to(self.query.device)
        return self._replace(query=self.query.index_select(0, index), lse=self.lse.index_select(0, index))


class EvictingLayer(FixedDecoding, AttendingLayer):
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
        fixed: generate in buffers that never move, see `fixed`.
    """

    fields: ClassVar[dict[str, torch.dtype]] = {}
    wants_scores: ClassVar[bool] = False

    def __init__(self, budget: Budget, codec: str | None = None, fixed: bool = False, **kwargs: Any) -> None:
        self.budget = budget
        self.codec = codec_named(codec)
        self.is_compileable = fixed
        super().__init__(**kwargs)

    def _clear(self) -> None:
        super()._clear()
        self.slots = Slots({}, 0)
        self.counts: list[int] = []  # per row: tokens kept, in its last slots
        self.budgets: list[int] | None = None  # per row, once a step has come
        self.online: list[bool] = []  # per row: whether its budget is of the tokens seen so far, for want of a prompt
        self.intact = 0  # so many of the newest tokens are stored one by one in every row
        self.record_past = False
        self._pending: Step | None = None  # a step that nothing was evicted after yet
        self._buffers: Slots | None = None  # buffers from before that step, to be filled again
        self._span: Tensor | None = None  # int32 [B, 2]: each row's slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.counts, self.num_kv_heads = [0] * key_states.shape[0], key_states.shape[1]
        self.online = [self.budget.is_share] * key_states.shape[0]
        if self.dtype == torch.bfloat16 and isinstance(self.codec, BFloat16):
            self.codec = Plain()

    # What a method decides.

    def observe(self, step: Step) -> None:
        """Update `slots` fields after the attention of `step`, whose keys are the last ones stored."""

    def score(self) -> Tensor:
        """[B, K, slots]: the tokens with the highest are kept. Sinks and recent tokens are kept whatever it says."""
        raise NotImplementedError

    def evict(self, targets: list[int]) -> None:
        """Make row r keep `targets[r]` of its `counts[r]` tokens, sorted, its sinks and recent ones among them."""
        self.keep(self.best(targets))

    def bias(self) -> Tensor | None:
        """fp32 [B, K, capacity], or None."""
        return None

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

    def keys_like(self, like: Tensor) -> Tensor:
        """The kept keys [B, K, slots, D], decoded in the dtype of `like`."""
        return self._decoded(self.slots, "keys", like)

    def bounds(self, num_queries: int) -> Tensor | None:
        """`block_sparse`'s bounds of the last `num_queries` tokens over the slots; None where no row is padded."""
        length = self.slots.length
        if min(self.counts) == length:
            return None
        rows = []
        for count in self.counts:
            real = min(count, num_queries)
            rows.append([[num_queries - real, num_queries, length - count, length]])
        return torch.tensor(rows, dtype=torch.int32).to(self.device)

    def key_positions(self) -> Tensor:
        """[B, K, slots], counted from the row's first real token; -1 for empty slots."""
        place = torch.arange(self.slots.length, device=self.device)
        empty = place < self.slots.length - self._column(self.counts)
        return (self.slots["position"] - self._column(self.pads)).masked_fill(empty, -1)

    def queries_of(self, step: Step | Call) -> scattered.Queries:
        """The newest step's queries, by position; for a pattern that no kernel can run over survivors."""
        num = step.query.shape[2]
        position = torch.arange(self.seen - num, self.seen, device=self.device) - self._column(self.pads)[:, 0]
        length = self.seen - min(self.pads)
        return scattered.Queries(step.query, position, step.spec, step.scale, step.softcap, length)

    # The protocol with the attention function.

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries over what is kept and the step itself; see `hf.watch.Call`."""
        if self.steps is not None and call.query.shape[2] == 1 and scattered.is_dense(call.spec):
            return self._fixed_step(call)
        self.leave_fixed()
        keys, values = self._begin(call)
        self._settle()
        num = keys.shape[2]
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
        self._pending = _step(call, lse)
        if not self.record_past:
            self._settle()
        return out, lse

    def attention(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the call over all slots, the last of which hold the step's own `keys` and `values`."""
        num, bias = keys.shape[2], self.bias()
        if num == 1 and self.codec.in_kernel(self.device) and scattered.is_dense(call.spec):
            return self._decode(call, bias, None)
        if self.codec.lossless:
            all_keys, all_values = self.slots["keys"], self.slots["values"]
        else:  # a chunk sees itself as the model computed it
            kept = Slots(self.slots.tensors, self.slots.length - num)
            all_keys = torch.cat([self._decoded(kept, "keys", keys), keys], 2)
            all_values = torch.cat([self._decoded(kept, "values", values), values], 2)
        bias = None if bias is None else bias[:, :, : self.slots.length]
        if scattered.is_dense(call.spec) and (bias is None or call.impl not in ("sdpa", "flex")):
            return attend(call._replace(key=all_keys, value=all_values, bounds=self.bounds(num)), bias)
        return scattered.attend(self.queries_of(call), scattered.Keys(all_keys, all_values, self.key_positions(), bias))

    def _decode(
        self, call: Call, bias: Tensor | None, span: Tensor | None, return_scores: bool = False
    ) -> tuple[Tensor, ...]:
        which: dict[str, Any] = {"bias": bias}
        tensors = self.slots.tensors
        if not self.codec.lossless:
            which |= {"k_scale": tensors["keys_scale"], "v_scale": tensors["values_scale"]}
        even = span is None and min(self.counts) == self.slots.length
        if even and len(which) == 1 and bias is None:  # views say it all
            return decode(call, self.slots["keys"], self.slots["values"])
        keys, values = tensors["keys"], tensors["values"]
        if keys.dtype == torch.uint8:
            keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
        if span is None and self._span is None:
            length = self.slots.length
            rows = [[length - count, length] for count in self.counts]
            self._span = torch.tensor(rows, dtype=torch.int32).to(self.device)
        span = self._span if span is None else span
        return decode(call, keys, values, spec=call.spec, bounds=span, return_scores=return_scores, **which)

    def _fixed_step(self, call: Call) -> tuple[Tensor, Tensor]:
        """One token a row: store, attend, score."""
        new, self._new = self._new, None
        steps, tensors = self.steps, self.slots.tensors
        if self.leads:
            steps.span[:, 1].add_(1)
        for name, x in self._encoded(*new).items():
            # By index: what else could be said so (`scatter_`, a slice), inductor does to a copy of the whole buffer.
            tensors[name][:, :, steps.last()] = x
        out, lse, *scores = self._decode(call, self.bias(), steps.span, self.wants_scores)
        self.observe(_step(call, lse)._replace(scores=scores[0] if scores else None))
        if self.ends:
            steps.seen.add_(1)
        return out, lse

    # What may happen to a step afterwards.

    def activate_past_recording(self) -> None:
        """Let the last step be cropped: evict after it only in `crop`, or when the next step comes."""
        self.leave_fixed()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, and evict what a recorded step would have evicted.

        Raises:
            ValueError: some of them are not stored one by one any more.
        """
        num = -negative(tokens_to_remove)
        if not self.is_initialized:
            return
        self.leave_fixed()
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
        self.leave_fixed()
        rows = to_list(indices)
        index = torch.as_tensor(rows, device=self.device)
        self.slots = self.slots.rows(index)
        self.pads, self.counts = [self.pads[r] for r in rows], [self.counts[r] for r in rows]
        self.online = [self.online[r] for r in rows]
        self.budgets = None if self.budgets is None else [self.budgets[r] for r in rows]
        self._pending = None if self._pending is None else self._pending.rows(index)
        self._buffers = self._span = None
        if self._pending is None:
            self._tidy()

    def memory(self) -> int:
        """Bytes allocated for what is kept and known of it."""
        return self.slots.nbytes()

    def kept_of_rows(self) -> list[tuple[int, int]]:
        """`(kept per KV head, seen)` of each row, in tokens that are no pads."""
        self.leave_fixed()
        return [(count, max(self.seen - pads, 0)) for count, pads in zip(self.counts, self.pads, strict=True)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        self.leave_fixed()
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

    def _new_slots(self, keys: Tensor, values: Tensor, position: Tensor | None = None) -> dict[str, Tensor]:
        """The step as slots: what the codec makes of it, its positions, and the method's fields, zero."""
        batch, heads, num = keys.shape[:3]
        new = self._encoded(keys, values)
        if position is None:
            position = torch.arange(self.seen, self.seen + num, device=self.device)
        new["position"] = position.to(torch.int32).expand(batch, heads, num)
        for name, dtype in self.fields.items():
            new[name] = torch.zeros(batch, heads, num, dtype=dtype, device=self.device)
        return new

    def _encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        pairs = (("keys", keys), ("values", values))
        return {name + suffix: part for name, x in pairs for suffix, part in self.codec.encode(x).items()}

    def _settle(self, cropped: bool = False) -> None:
        """Let the method see the last step, and evict what is over the budget.

        Who `crop`s after a step guesses tokens and checks them (assisted decoding): what is left is no prompt. That
        steps are recorded says less, for nobody tells when it ends.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        self.observe(step)
        several = step.num_queries > 1
        anew = self.budgets is None or (several and not cropped)
        if anew or any(self.online):
            self._count(anew, step.num_queries)
        if not self._shrink(several):
            self._tidy()
        self._buffers = None
        self._return()

    def _tidy(self) -> None:
        """Own what is kept, and begin where the longest row does: no slots are held for pads that all rows have."""
        length = max(self.counts)
        empty = self.slots.length - length
        if empty or self.slots.borrowed:
            filled = Slots({name: self.slots[name][:, :, empty:] for name in self.slots.tensors})
            self.slots = filled.owned(min(length + GRAIN, self._capacity(length)))
            self._span = None

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
        return room(most) if self.is_compileable else most + 1

    def _decoded(self, slots: Slots, name: str, like: Tensor) -> Tensor:
        parts = {key[len(name) :]: slots[key] for key in slots.tensors if key.startswith(name)}
        return self.codec.decode(parts, like)

    def _column(self, numbers: Any) -> Tensor:
        """Numbers per row as int64 [B, 1, 1]."""
        return torch.tensor(numbers, device=self.device)[:, None, None]


def _step(call: Call, lse: Tensor) -> Step:
    if call.sinks is not None:  # what a query gives to sinks it does not give to keys
        lse = torch.logaddexp(lse, call.sinks)
    return Step(call.query, lse, call.spec, call.scale, call.softcap, call.impl)
