"""SinkLoRA's Sink Fixed attention (SF-Attn): shifted groups, part of the shifted heads returned, sinks for every row.

Source: "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", arXiv 2406.05678,
section 3. Its repository holds no implementation, so this follows the paper's text, made causal.

    row i sees key j  iff  j <= i and ( group(i) == group(j)  or  j < num_sinks )

Of the half of the heads that LongLoRA shifts, `returned_fraction` goes back to unshifted groups ("segmentation and
reassembly"); the first tokens of each document are sinks. Departures: the paper lets the sinks attend to everything,
and everything to the sinks, which shows every token the future through one hop; here all rows stay causal. Groups need
not divide the sequence, and heads split by query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lcpatch_kernels import Rule

from .base import GroupedPattern, LayerShape, _is_int, _is_number, patterns


@patterns.register("sf")
@dataclass(frozen=True)
class SF(GroupedPattern):
    """SinkLoRA's SF-Attn.

    Args:
        group_size: tokens per group; or
        group_ratio: the group as a share of the sequence (default 1/4).
        returned_fraction: share of the shifted half of the heads that returns to unshifted groups. 0 is `shift` with
            sinks, 1 plain groups with sinks.
        num_sinks: tokens at the start of each document that every later row sees.
    """

    title: ClassVar[str] = "SinkLoRA's SF-Attn: shifted groups, some heads returned, sink tokens"
    paper: ClassVar[str] = "2406.05678"
    paper_title: ClassVar[str] = (
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models"
    )
    authors: ClassVar[str] = "Zhang, Hengyu"
    default_mode: ClassVar[str] = "train"

    returned_fraction: float = 0.5
    num_sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction_ok = _is_number(self.returned_fraction) and 0 <= self.returned_fraction <= 1
        self._require("returned_fraction", "a number in [0, 1]", fraction_ok)
        self._require("num_sinks", "a whole number >= 0", _is_int(self.num_sinks) and self.num_sinks >= 0)

    def rules(self, layer: LayerShape) -> Sequence[Rule]:
        plain = Rule(self.num_sinks, group=self.group, back=0)
        shifted = Rule(self.num_sinks, group=self.group, shifted=True, back=0)
        half = layer.num_heads // 2
        num_shifted = half - round(half * self.returned_fraction)
        return [plain] * (layer.num_heads - num_shifted) + [shifted] * num_shifted
