"""RetroLM's cache: nothing is forgotten, and every new token looks up the pages of the past that fit its query.

Source: arXiv 2502.11444 (pages of 128 tokens, retrieval per layer, the rest may live on the CPU). Departures:

- The paper retrieves once for every user query; here each generated token retrieves for itself, per KV head.
- Its prompt streams through retrieved pages; here several tokens at a time (a prompt, its chunks, a later turn) attend
  to everything, so that nothing is lost while reading.
- Scores are trained there ("bookmark"); "quest" and "mean" need no training, and "bookmark" begins as "mean".

Scores of the query heads that share a KV head are put together by their maximum, or by the sum of their softmaxes;
averaging the queries first would lose what one head alone looks for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..hf.models import attention_modules, unwrap
from .budget import check_integer
from .cache import caches, routed_layers
from .codec import codec_named
from .fixed_pages import FixedPages
from .growing import DenseLayer
from .paged import PagedCache, PagedLayer
from .pages import Pages
from .reads import Reads
from .scorer_index import GROUPS, ScorerIndex
from .scorers import make_scorers
from .tiers import TieredPages

PAGE = 16  # for scorers that do not say what they are for


@caches.register("retrieval")
class RetrievalCache(PagedCache):
    """`model.generate(**inputs, past_key_values=RetrievalCache(model, budget=2048))`: a token reads the pages that fit.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens that a generated token attends to per KV head, in whole pages; a float is a share of the row's.
        scorer: "mean", "quest", "bookmark", a scorer's class, or `caches.scorers.Bookmarks` that were trained. "mean"
            remembers 1 / (2 page) of the keys and values, "quest" twice that.
        page: tokens a page, a power of two; None: what the scorer asks for, 128 for bookmarks as in RetroLM, else 16 as
            in Quest. With a fifth of 4K and 8K tokens read, SmolLM2 answers 62 of 80 questions by "mean" in pages of 16
            (or 8), by "quest" 54 in pages of 16 and 62 in pages of 8; 64 with all of it read.
        num_sinks, recent: tokens at the row's begin and end whose pages are always read.
        group: how the scores of a KV head's query heads are put together: "max", or "softmax" (their sum).
        dense_layers: so many of the first layers read everything (Quest's choice is 2).
        offload: keep the pages in host memory, and on the device those read last, within the budget.
        codec: with `offload`, how a full page lies in host memory: "int8", "int4", "fp8", "bf16", or None (as it is).
            On the device it is as it came, so a page has lost something once it has left and is read again; several
            tokens at a time (a later turn) read all that have left. Scorers sum up the keys as they came; only a page
            that `crop` opens again after it has left is filled up, and then summed up, from what came back.
        compiled: generate in buffers that never move: on a GPU `generate` then compiles the decode step, and replays it
            as a CUDA graph until there is room no more (for 4,096 tokens or a quarter of the text, whichever is more;
            then it compiles once more). The same is read and kept as without. Read long prompts by `cache.read(ids,
            chunk=8192)` before: `prefill_chunk_size` would compile the chunks too. Not on layers with a pattern, nor
            with `dense_layers`, which grow; `stats(measure=True)` then measures nothing.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        UnknownNameError: no such scorer.
        ValueError: options out of range or that exclude each other, or a budget that the pages always read fill.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | float = 2048,
        *,
        scorer: Any = "mean",
        page: int | None = None,
        num_sinks: int = 4,
        recent: int = 128,
        group: str = "max",
        dense_layers: int = 0,
        offload: bool = False,
        codec: str | None = None,
        compiled: bool = False,
    ) -> None:
        if group not in GROUPS:
            raise ValueError(f"group={group!r} is not one of {', '.join(map(repr, GROUPS))}")
        check_integer("dense_layers", dense_layers, 0)
        stored = codec_named(codec)
        if codec is not None and not offload:
            raise ValueError(
                f"codec={codec!r} is how pages lie in host memory, and with offload=False none do: give offload=True, "
                "or leave codec out"
            )
        if compiled and dense_layers:
            raise ValueError(
                f"compiled=True generates in buffers that stay, and dense_layers={dense_layers} grow with every token: "
                "leave one of them out"
            )
        base = unwrap(model)
        attention_modules(base)  # says what is no model
        by_layer = make_scorers(scorer, base.config.num_hidden_layers)
        page = getattr(by_layer[0], "page", PAGE) if page is None else page
        reads = Reads(budget, page, num_sinks, recent)

        def make(index: int) -> Any:
            if index < dense_layers:
                return DenseLayer()
            return RetrievalLayer(
                reads,
                lambda reads, rows: ScorerIndex(by_layer[index], page, group, rows),
                lambda: TieredPages(page, stored) if offload else Pages(page),
                fixed=compiled,
            )

        super().__init__(layers=routed_layers(model, "RetrievalCache", make, compiled))


class RetrievalLayer(FixedPages, PagedLayer):
    """One layer."""

    owner = "RetrievalCache"
