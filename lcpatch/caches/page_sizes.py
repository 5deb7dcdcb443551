"""How long a layer's pages may be: measured on a text, by how much of its attention pages of each size still hold.

Attention that falls on single keys here and there wants short pages, or the budget goes to their neighbours; where it
is spread, or falls on whole passages, long pages hold as much, and bounds of pages, look-ups and fetches are fewer: a
page of `n` tokens costs 1 / n of its keys and values on the fast tier.

Source: LeoAM, arXiv 2506.20187, whose chunks differ by layer. Departure: the paper's sizes are set by hand; here each
layer has the largest that loses next to nothing against the best, which is what "skew" is measured by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..hf.head import decoder_of
from ..hf.models import evaluating, unwrap
from ..hf.watch import Call, ask, attend
from .cache import LongCache, routed_layers
from .paged import PagedLayer
from .pages import Pages
from .reads import Reads
from .tree_index import TreeIndex

PAGE = 32
"""Tokens a page where nothing was measured."""

PAGES = (8, 16, 32, 64)


def page_sizes(
    model: nn.Module, ids: Tensor, budget: int | float = 0.2, *, loss: float = 0.01, **options: Any
) -> list[int]:
    """The page size of every layer: `TieredCache(model, budget, page=page_sizes(model, ids))`.

    The largest of the sizes tried whose pages hold as much of the attention as those of the best size, but for `loss`.

    Args:
        model: a causal language model of transformers, patched or not.
        ids: token ids [B, T] of a text like those to come, without pads; a few thousand tokens.
        budget: tokens that a token reads of this text; a share carries over to longer ones.
        loss: attention mass that a layer may lose for longer pages, as a share of all.
        options: those of `recall_by_page`.

    Returns:
        A size for every layer; `PAGE` for layers that do not attend to their whole past.

    Raises:
        ValueError: options out of range, or a text that the budget holds.
        UnsupportedModelError: a model that no cache of ours works with.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"loss={loss!r} must be a share of the attention, at least 0 and below 1")
    recalled = recall_by_page(model, ids, budget, **options)
    best = []
    for by_size in recalled:
        enough = max(by_size.values(), default=0) - loss
        best.append(max((size for size, share in by_size.items() if share >= enough), default=PAGE))
    return best


@torch.no_grad()
def recall_by_page(
    model: nn.Module,
    ids: Tensor,
    budget: int | float = 0.2,
    *,
    pages: Sequence[int] = PAGES,
    queries: int = 16,
    top: int | None = None,
    num_sinks: int = 4,
    recent: int = 64,
) -> list[dict[int, float]]:
    """For every layer and page size, which share of the full attention the pages that a tiered cache reads hold.

    The text runs through the model once, with full attention. In each layer, its last queries are asked again, one at a
    time, of pages of every size, and compared as `stats(measure=True)` does; no more than one layer's pages exist at a
    time.

    Args:
        model, ids, budget: as for `page_sizes`.
        pages: sizes to try, powers of two.
        queries: so many of the text's last tokens ask.
        top, num_sinks, recent: as for `TieredCache`.

    Returns:
        For each layer the mean share by page size, over rows, query heads and queries; empty for layers that do not
        attend to their whole past. Layers with a pattern read all that it shows them: 1.
    """
    if ids.dim() != 2 or not 1 <= queries < ids.shape[1]:
        raise ValueError(f"ids must be [B, T] with more than queries={queries!r} >= 1 tokens; got {list(ids.shape)}")
    reads = [Reads(budget, page, num_sinks, recent) for page in pages]
    for each in reads:
        _check(each, ids.shape[1] - queries)
    cache = LongCache(layers=routed_layers(model, "page_sizes", lambda _: _Probe(reads, top, queries)))
    with evaluating(model):
        decoder_of(unwrap(model))(input_ids=ids, past_key_values=cache, use_cache=True)
    return [getattr(layer, "recalled", {}) for layer in cache.layers]


def _check(reads: Reads, tokens: int) -> None:
    """Refuse sizes that would not be compared at one budget.

    Raises:
        ValueError: `tokens` are too few to tell.
    """
    budget = reads.budget.of(tokens)
    if budget >= tokens:
        raise ValueError(f"a budget of {budget} tokens holds all of this text; give a longer one, or a smaller budget")
    if budget < reads.least * reads.page:
        raise ValueError(
            f"a budget of {budget} tokens of this text is less than the {reads.least} pages that are always read when "
            f"a page has {reads.page}; give a longer text, fewer recent tokens, or pages without {reads.page}"
        )


class _Probe(DynamicLayer):
    """Attends densely to a text that comes at once, and asks pages of every size what they would have given."""

    expected = False

    def __init__(self, reads: list[Reads], top: int | None, queries: int) -> None:
        super().__init__()
        self.reads, self.top, self.queries = reads, top, queries
        self.recalled: dict[int, float] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states  # nothing is kept: no step follows

    def can_trace(self, num: int) -> bool:
        return False

    def wants_dense(self, query: Tensor) -> bool:
        return True

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        self.recalled = {reads.page: self._recall(call, reads) for reads in self.reads}
        return attend(call)

    def _recall(self, call: Call, reads: Reads) -> float:
        """The mean share that the last queries find on pages of this size."""
        layer = PagedLayer(reads, lambda reads, rows: TreeIndex(reads, self.top, rows), lambda: Pages(reads.page))
        batch, _, end, _ = call.query.shape
        begin = end - self.queries
        past = {"keys": call.key[:, :, :begin], "values": call.value[:, :, :begin]}
        numbers = {"seen": begin, "pads": [0] * batch, "budgets": [reads.of(begin)] * batch}
        numbers |= {"online": [0] * batch, "capacity": begin}
        layer.load_state(past, numbers, call.key[:1, :, :0])
        shares = []
        for n in range(begin, end):
            q, k, v = (x[:, :, n : n + 1] for x in (call.query, call.key, call.value))
            layer.expected = True
            k, v = layer.update(k, v)
            ask(layer, call._replace(query=q, key=k, value=v, bounds=None, sinks=None))
            shares.append(layer.recalled())
        return float(torch.stack(shares).mean())
