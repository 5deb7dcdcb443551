"""LongLoRA's shifted sparse attention: attention within groups, half of the heads with groups shifted by half a group.

Source: "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv 2309.12307, section 3.2, where it
is called S2-Attn. The variant is that of the authors' flash-attention branch: the shifted heads' first and last groups
are short. Their other branch rolls the sequence, so that its first S/8 tokens see its last S/8: `wrap=True`, for parity
only.

    row i sees key j  iff  j <= i and group(i) == group(j)
    group(i) = i // G in the first half of the heads, (i + G - G // 2) // G in the other

Trained sparse and run dense, as in the paper. Departures: groups need not divide the sequence (the last one is short),
they start anew in every packed document, and heads split by query head, never repeating K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lcpatch_kernels import Rule

from .base import GroupedPattern, LayerShape, patterns


@patterns.register("shift")
@dataclass(frozen=True)
class Shift(GroupedPattern):
    """LongLoRA's shifted sparse attention.

    Args:
        group_size: tokens per group; or
        group_ratio: the group as a share of the sequence (default 1/4).
        wrap: roll the sequence instead of shifting the boundaries. Leaks the future into the first group.
    """

    title: ClassVar[str] = "LongLoRA's shifted groups: half of the heads by half a group"
    paper: ClassVar[str] = "2309.12307"
    paper_title: ClassVar[str] = "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models"
    authors: ClassVar[str] = (
        "Chen, Yukang and Qian, Shengju and Tang, Haotian and Lai, Xin and Liu, Zhijian and Han, Song and Jia, Jiaya"
    )
    default_mode: ClassVar[str] = "train"

    wrap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("wrap", "True or False", isinstance(self.wrap, bool))

    @property
    def causal(self) -> bool:
        return not self.wrap

    @property
    def follows_length(self) -> bool:
        return super().follows_length or self.wrap  # rolling takes the sequence's end to its front

    def rules(self, layer: LayerShape) -> Sequence[Rule]:
        plain = Rule(group=self.group, back=0, cyclic=self.wrap)
        shifted = Rule(group=self.group, shifted=True, back=0, cyclic=self.wrap)
        num_shifted = layer.num_heads // 2
        return [plain] * (layer.num_heads - num_shifted) + [shifted] * num_shifted
