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

import torch
from torch import Tensor, nn

from .budget import check_whole
from .cache import caches, routed_layers
from .codec import codec_named
from .fixed_pages import FixedPages
from .growing import DenseLayer
from .marks import FixedMarks, Marks, Now
from .paged import PagedCache, PagedLayer
from .pages import Pages
from .reads import Reads
from .rows import rearranged
from .scorers import Scorer, make_scorers
from .tiers import TieredPages

GROUPS = ("max", "softmax")
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
        check_whole("dense_layers", dense_layers, 0)
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
        by_layer = make_scorers(scorer, model.config.get_text_config().num_hidden_layers)
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


class ScorerIndex:
    """What a scorer remembers of every page, [B, K, pages, …].

    Args:
        scorer: of this layer.
        page: tokens a page.
        group: how the query heads of a KV head are put together.
        num_rows: batch rows.
    """

    def __init__(self, scorer: Scorer, page: int, group: str, num_rows: int) -> None:
        self.scorer, self.page, self.group, self.num_rows = scorer, page, group, num_rows
        self.summary: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, rows: list[int], begin: int, room: int) -> None:
        self._append(self.scorer.summarise(keys, self.page), rows, begin, room)

    def _append(self, new: tuple[Tensor, ...], rows: list[int], begin: int, room: int) -> None:
        self._reserve(room, new)
        for own, x in zip(self.summary, new, strict=True):
            own[rows, :, begin : begin + x.shape[2]] = x

    def _reserve(self, room: int, like: tuple[Tensor, ...]) -> None:
        """Room for so many pages, remembered by what `like` is."""
        if not self.summary:
            self.summary = tuple(x.new_zeros(self.num_rows, x.shape[1], 0, *x.shape[3:]) for x in like)
        if (missing := room - self.summary[0].shape[2]) > 0:
            self.summary = tuple(
                torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2) for x in self.summary
            )

    def scores(self, query: Tensor, marks: Marks, scale: float | None) -> Tensor:
        return self._scores(query, tuple(x[:, :, : marks.most] for x in self.summary), marks.real, scale)

    def _scores(self, query: Tensor, summary: tuple[Tensor, ...], real: Tensor, scale: float | None) -> Tensor:
        scores = self.scorer.score(query, summary)
        scores = scores.unflatten(1, (summary[0].shape[1], -1))  # [B, K, H // K, pages]
        if self.group == "max":
            return scores.amax(2)
        # A row's shares are its own: pages that it has not must not get any.
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (scores * scale).masked_fill(~real[:, None], -torch.inf).softmax(-1).sum(2).nan_to_num()

    # For a layer that generates in tensors which never move.

    def stand_still(self, pages: int, like: Tensor) -> None:
        """Have room for so many pages, [B, K, 0, D] as `like`."""
        self._reserve(pages, self.summary or self.scorer.summarise(_one_page(like, self.page), self.page))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a step reads and writes."""
        return self.summary

    def put(self, keys: Tensor, newest: Tensor) -> None:
        """Take the page [B, K, page, D] of every row, its open one, as number `newest` [B, 1, 1], full or not."""
        row, place = torch.arange(len(newest), device=newest.device), newest.flatten()
        for own, x in zip(self.summary, self.scorer.summarise(keys, self.page), strict=True):
            own[row, :, place] = x[:, :, 0]  # by index, as in `TieredPages.put`

    def fixed_scores(self, query: Tensor, fixed: FixedMarks, now: Now, scale: float | None) -> Tensor:
        """As `scores`, over all pages that there is room for: shapes and control follow from no length."""
        return self._scores(query, tuple(x[:, :, : fixed.place.shape[0]] for x in self.summary), now.real, scale)

    # For a file.

    def state(self, pages: int, like: Tensor) -> dict[str, Tensor]:
        self.stand_still(pages, like)
        return {f"summary{n}": x[:, :, :pages] for n, x in enumerate(self.summary)}

    def likes(self, like: Tensor) -> dict[str, Tensor]:
        return {f"summary{n}": x for n, x in enumerate(self.scorer.summarise(_one_page(like, self.page), self.page))}

    def append_known(self, known: dict[str, Tensor], rows: list[int], room: int) -> None:
        self._append(tuple(known.values()), rows, 0, room)

    def top_pages(self, limits: list[int]) -> list[int]:
        """None: it looks for no keys."""
        return []

    def cut(self, row: int, pages: int) -> None:
        """Nothing to do: a page that is not full is not looked at, and written anew when it is."""

    def select_rows(self, rows: list[int]) -> None:
        self.num_rows = len(rows)
        self.summary = tuple(rearranged(x, rows) for x in self.summary)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.summary)


def _one_page(like: Tensor, page: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], page, like.shape[3])
