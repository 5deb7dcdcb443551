"""What a layer that evicts remembers of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec

from ..hf.watch import Call


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


def step_of(call: Call, lse: Tensor, scores: Tensor | None = None) -> Step:
    """What `call` was, whose attention to keys gave `lse`."""
    if call.sinks is not None:  # what a query gives to sinks it does not give to keys
        lse = torch.logaddexp(lse, call.sinks)
    return Step(call.query, lse, call.spec, call.scale, call.softcap, call.impl, scores)
