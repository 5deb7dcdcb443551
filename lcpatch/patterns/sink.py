"""Attention sinks: the first tokens and a sliding window.

Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2.

    row i sees key j  iff  j <= i and ( i - j < window  or  j < num_sinks )

Departure: positions stay the sequence's own. The paper's endless stream, which renumbers what is kept, is a cache's
business. It does not extend the context: what leaves the window is gone, but for the sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lcpatch_kernels import Rule

from .base import AttentionPattern, LayerShape, _is_int, patterns


@patterns.register("sink")
@dataclass(frozen=True)
class Sink(AttentionPattern):
    """Attention sinks with a sliding window.

    Args:
        num_sinks: tokens at the start of the sequence that every row sees.
        window: most recent tokens that a row sees, itself included.
    """

    title: ClassVar[str] = "attention sinks: the first tokens + a sliding window"
    paper: ClassVar[str] = "2309.17453"
    paper_title: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks"
    authors: ClassVar[str] = "Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike"
    default_mode: ClassVar[str] = "always"

    num_sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        self._require("num_sinks", "a whole number >= 0", _is_int(self.num_sinks) and self.num_sinks >= 0)
        self._require("window", "a whole number >= 1", _is_int(self.window) and self.window >= 1)

    def rules(self, layer: LayerShape) -> Sequence[Rule]:
        return [Rule(self.num_sinks, back=self.window - 1)] * layer.num_heads
