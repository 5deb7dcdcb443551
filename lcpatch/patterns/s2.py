"""Sparsely-Sharded attention (S2): local blocks plus a stripe of far blocks, a different stripe for every KV head.

Source: "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", arXiv 2407.17678; block indexing as in
its library DKernel. Not LongLoRA's "S2-Attn", which is `shift`.

    row block i sees key block j  iff  j <= i and ( i - j < local_blocks  or  j mod stride == residue(head)
                                                    or  j < sink_blocks )

Departures: the residue belongs to the KV head, so that all query heads of a group read the same blocks and the others
can be evicted (`share="query_head"` is the paper's form); it moves on from layer to layer, so that a few layers
together cover every block (`layer_offset="rotate"`); one sink block stays visible to all, without which an untuned
SmolLM2-135M goes from perplexity 21.7 to 38.3 at 4K instead of to 22.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lcpatch_kernels import DENSE, Rule

from .base import AttentionPattern, LayerShape, _is_int, patterns


@patterns.register("s2")
@dataclass(frozen=True)
class S2(AttentionPattern):
    """Sparsely-Sharded attention.

    Args:
        block_size: tokens per block; a power of two, at least 16.
        local_blocks: blocks up to and including the row's own that it sees.
        stride: distance of the far blocks, in blocks: each head sees every `stride`-th. 1 is dense, None sees none.
        sink_blocks: blocks at the start of the sequence that every row sees (0 in the paper).
        num_dense_heads: the last n KV heads (query heads with share="query_head") attend densely.
        share: which heads have a stripe in common: "kv_head" (a group of query heads), "query_head" (none) or
            "layer" (all).
        head_step: how far the residue moves from one head to the next, in blocks.
        layer_offset: residue of a layer's first head: "rotate" (each sparse layer goes on where the last one
            stopped) or a fixed number of blocks.
    """

    title: ClassVar[str] = "Sparsely-Sharded attention: local blocks + a stripe per head"
    paper: ClassVar[str] = "2407.17678"
    paper_title: ClassVar[str] = "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads"
    authors: ClassVar[str] = (
        "Lin, Xihui and Zhang, Yunan and Ge, Suyu and Ren, Liliang and Patra, Barun and Chaudhary, Vishrav and "
        "Peng, Hao and Song, Xia"
    )
    default_mode: ClassVar[str] = "always"

    block_size: int = 64
    local_blocks: int = 16
    stride: int | None = 16
    sink_blocks: int = 1
    num_dense_heads: int = 0
    share: Literal["kv_head", "query_head", "layer"] = "kv_head"
    head_step: int = 1
    layer_offset: int | Literal["rotate"] = "rotate"

    def __post_init__(self) -> None:
        b = self.block_size
        self._require(
            "block_size", "a power of two >= 16: 16, 32, 64, 128, …", _is_int(b) and b >= 16 and not b & b - 1
        )
        self._require("local_blocks", "a whole number >= 1", _is_int(self.local_blocks) and self.local_blocks >= 1)
        stride_ok = self.stride is None or (_is_int(self.stride) and self.stride >= 1)
        self._require("stride", "a whole number >= 1 (1 is dense), or None for local blocks only", stride_ok)
        for name in ("sink_blocks", "num_dense_heads", "head_step"):
            value = getattr(self, name)
            self._require(name, "a whole number >= 0", _is_int(value) and value >= 0)
        self._require("share", "'kv_head', 'query_head' or 'layer'", self.share in ("kv_head", "query_head", "layer"))
        offset_ok = self.layer_offset == "rotate" or (_is_int(self.layer_offset) and self.layer_offset >= 0)
        self._require("layer_offset", "'rotate' or a whole number >= 0", offset_ok)
        if self.share == "layer" and self.num_dense_heads:
            raise ValueError(f"s2: share='layer' has one pattern for all heads; num_dense_heads={self.num_dense_heads}")

    @classmethod
    def phi3_small(cls) -> S2:
        """The pattern of Phi-3-small's sparse layers; for `layers="every_2"`, as it makes every second layer dense.

        Source: microsoft/Phi-3-small-8k-instruct's configuration. Its softmax scale 1/D is the model's own business.
        """
        return cls(64, local_blocks=16, stride=8, sink_blocks=0, share="query_head", layer_offset=1)

    def rules(self, layer: LayerShape) -> Sequence[Rule]:
        num_patterns, num_sparse = self._num_patterns(layer)
        per_pattern = [self._rule(self._residue(p, layer.rank, num_sparse)) for p in range(num_sparse)]
        per_pattern += [DENSE] * (num_patterns - num_sparse)
        repeat = layer.num_heads // num_patterns
        return [rule for rule in per_pattern for _ in range(repeat)]

    def warnings(self, layer: LayerShape) -> list[str]:
        if self.stride in (None, 1):
            return []
        _, num_patterns = self._num_patterns(layer)
        seen = {self._residue(p, rank, num_patterns) for rank in range(layer.num_sparse) for p in range(num_patterns)}
        if not seen or len(seen) == self.stride:
            return []
        message = (
            f"s2: {layer.num_sparse} sparse layers with {num_patterns} patterns each reach {len(seen)} of the "
            f"{self.stride} block residues: {self.stride - len(seen)} of {self.stride} far blocks are seen by no head. "
            f"Use a stride of at most {layer.num_sparse * num_patterns}, layer_offset='rotate', or more sparse layers"
        )
        return [message]

    def _num_patterns(self, layer: LayerShape) -> tuple[int, int]:
        """How many patterns a layer has, and how many of them are sparse."""
        total = {"kv_head": layer.num_kv_heads, "query_head": layer.num_heads, "layer": 1}[self.share]
        if self.num_dense_heads > total:
            raise ValueError(f"s2: num_dense_heads={self.num_dense_heads}, but the layer has {total} {self.share}s")
        return total, total - self.num_dense_heads

    def _residue(self, pattern: int, rank: int, num_patterns: int) -> int:
        offset = rank * num_patterns * self.head_step if self.layer_offset == "rotate" else self.layer_offset
        return -(pattern * self.head_step + offset) % (self.stride or 1)

    def _rule(self, residue: int) -> Rule:
        if self.stride == 1:
            return DENSE
        b = self.block_size
        stride = self.stride or 0
        return Rule(self.sink_blocks * b, stride, residue, group=b, back=(self.local_blocks - 1) * b)
