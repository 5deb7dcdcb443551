"""A layer whose kept tokens lie in slots, each KV head its own, and that attends over them by their positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hf.watch import Call, attend
from . import scattered
from .codec import BFloat16, Plain, codec_named
from .layer import AttendingLayer, decode
from .slots import Slots
from .step import Step


class SlottedLayer(AttendingLayer):
    """How kept tokens are stored and read. Which are kept, `EvictingLayer` says.

    Args:
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".
    """

    fields: ClassVar[dict[str, torch.dtype]] = {}  # what else is known of each kept token, [B, K, capacity]

    def __init__(self, codec: str | None = None) -> None:
        self.codec = codec_named(codec)
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.slots = Slots({}, 0)
        self.counts: list[int] = []  # per row: tokens kept, in its last slots
        self._span: Tensor | None = None  # int32 [B, 2]: each row's slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.counts, self.num_kv_heads = [0] * key_states.shape[0], key_states.shape[1]
        if self.dtype == torch.bfloat16 and isinstance(self.codec, BFloat16):
            self.codec = Plain()

    def bias(self) -> Tensor | None:
        """fp32 [B, K, capacity], or None."""
        return None

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

    def attention(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the call over all slots, the last of which hold the step's own `keys` and `values`."""
        num, bias = keys.shape[2], self.bias()
        if num == 1 and self.codec.in_kernel and scattered.is_dense(call.spec):
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
        if even and self.codec.lossless and bias is None:  # views say it all
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

    def memory(self) -> int:
        """Bytes allocated for what is kept and known of it."""
        return self.slots.nbytes()

    # Storing.

    def _new_slots(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The step as slots: what the codec makes of it, its positions, and the method's fields, zero."""
        batch, heads, num = keys.shape[:3]
        new = self._encoded(keys, values)
        position = torch.arange(self.seen, self.seen + num, device=self.device)
        new["position"] = position.to(torch.int32).expand(batch, heads, num)
        for name, dtype in self.fields.items():
            new[name] = torch.zeros(batch, heads, num, dtype=dtype, device=self.device)
        return new

    def _encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        pairs = (("keys", keys), ("values", values))
        return {name + suffix: part for name, x in pairs for suffix, part in self.codec.encode(x).items()}

    def _decoded(self, slots: Slots, name: str, like: Tensor) -> Tensor:
        parts = {key[len(name) :]: slots[key] for key in slots.tensors if key.startswith(name)}
        return self.codec.decode(parts, like)

    def _column(self, numbers: Any) -> Tensor:
        """Numbers per row as int64 [B, 1, 1]."""
        return torch.tensor(numbers, device=self.device)[:, None, None]
