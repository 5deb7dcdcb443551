"""StreamingLLM's cache: the first tokens and a window of the newest, endless generation at fixed memory.

Source: arXiv 2309.17453 (section 3.2). Attention mass sits on the first tokens whatever they say ("attention sinks"):
a window alone collapses once they leave it, 4 sinks beside it hold perplexity. It is no longer context: what leaves the
window is forgotten.
"""

from __future__ import annotations

from torch import Tensor, nn

from .budget import Budget
from .evicting import EvictingLayer
from .layer import LongCache, caches, routed_layers


@caches.register("sink")
class SinkCache(LongCache):
    """`model.generate(**inputs, past_key_values=SinkCache(model, budget=1024))`: sinks and the newest tokens.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens kept per KV head, sinks included; a float is a share of the prompt's tokens.
        num_sinks: the row's first real tokens, kept for ever.
        codec: how keys and values are stored: None (as they are), "bf16", "int8", "int4" or "fp8".

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: options out of range.
    """

    chunks_differ = "a chunk does not see what left the window before it"

    def __init__(
        self, model: nn.Module, budget: int | float = 1024, *, num_sinks: int = 4, codec: str | None = None
    ) -> None:
        kept = Budget(budget, num_sinks, recent=1.0)

        def make(index: int, module: nn.Module) -> SinkLayer:
            return SinkLayer(kept, codec)

        super().__init__(layers=routed_layers(model, "SinkCache", make))


class SinkLayer(EvictingLayer):
    """One layer: what is neither sink nor recent goes."""

    owner = "SinkCache"

    def score(self) -> Tensor:
        return self.slots["position"].float()
