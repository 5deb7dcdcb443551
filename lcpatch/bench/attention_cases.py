"""What the benchmarks of one layer's attention are about: shapes and patterns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec

from ..patterns import AttentionPattern, LayerShape
from ..patterns.s2 import S2
from ..patterns.sf import SF
from ..patterns.shift import Shift
from ..patterns.sink import Sink


@dataclass(frozen=True)
class Shape:
    """Batch, query heads, KV heads and head dim of one measurement."""

    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads must be a multiple of the {self.num_kv_heads} KV heads")

    def inputs(self, length: int, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in bf16 with standard deviation 1, laid out as Hugging Face's layers hand them over."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        size = [(self.batch, length, h, self.head_dim) for h in heads]
        tensors = (torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in size)
        return tuple(t.requires_grad_(grad) for t in tensors)


SHAPES = {
    "32 / 8 heads of 128": Shape(),
    "32 / 8 heads of 64": Shape(head_dim=64),
    "32 / 8 heads of 256": Shape(head_dim=256),
    "32 / 32 heads of 128": Shape(num_kv_heads=32),
}
SHAPES_PATTERN = "s2 64/16/16"


def cases() -> dict[str, AttentionPattern]:
    """The patterns measured. S2 is named block/local/stride and has no sink block, as in the literature's figures."""
    s2 = {
        f"s2 {b}/{n}/{v}": S2(b, n, v, sink_blocks=0)
        for b, n, v in [(64, 16, 16), (64, 16, 8), (128, 8, 16), (64, 16, 32)]
    }
    return {**s2, "sf N/4": SF(), "shift N/4": Shift(), "sink 4+1024": Sink()}


def spec_of(pattern: AttentionPattern, shape: Shape) -> BlockSparseSpec:
    """The pattern compiled for one layer of `shape`."""
    return pattern.spec(LayerShape(shape.num_heads, shape.num_kv_heads))
