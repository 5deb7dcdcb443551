"""LeoAM's cache: a budget on the fast tier, the rest in host memory and on disk, and bounds that say what comes back.

Source: arXiv 2506.20187. The fast tier (the GPU; on a machine without one, main memory beside a disk) holds the pages
used last and, of every page, the bounds of its keys. A generated token searches the tree of those bounds (`tree.py`)
for the pages that may hold one of its best keys; what is not on the fast tier is fetched, and with a disk, while a
layer attends, the next one begins to fetch what this one's query would ask for there. Departures:

- The paper's rule takes twice the pages it wants by their upper bound and scores those exactly. Here pages are kept by
  a rule that proves what it drops, and where more are left than fit the budget, the best upper bounds win.
- Its pages are longer where a layer's attention is skewed less: in its code, 8 tokens in the first two layers and 32 in
  the others. Here `page` is one size, or one for every layer, which `page_sizes` measures on a text.
- Bounds stay on the fast tier (1 / page of the keys and values together) instead of on every tier.
- How much a token attends to and how much the fast tier holds are two numbers: the second over the first is how many
  different choices stay at hand, and so the hit rate.
- Several tokens at a time attend to everything, brought in for one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.flags import check_flag
from ..hf.models import attention_modules, full_attention_layers, unwrap
from ..hf.watch import Call
from .budget import check_integer, is_integer
from .cache import caches, routed_layers
from .codec import codec_named
from .fixed_pages import FixedPages
from .page_sizes import PAGE, page_sizes
from .paged import PagedCache, PagedLayer
from .reads import Reads
from .spill import scratch_file
from .tiers import TieredPages
from .tree_index import TreeIndex
from .untrusted import whole

__all__ = ["TieredCache", "page_sizes"]

ATTEND = 4096
"""Tokens that one attends to by default, of a row that the fast tier does not hold: 277 MB of an 8B model's int8 pages,
6 ms of a bus of 50 GB/s, if the fast tier has none of them."""


@caches.register("tiered")
class TieredCache(PagedCache):
    """`model.generate(**inputs, past_key_values=TieredCache(model, budget=8192, disk="/scratch"))`: nothing is lost.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens per KV head on the fast tier, in whole pages; a float is a share of the row's. A row that it
            holds is attended to in full.
        gpu_bytes: instead of `budget`: bytes of keys and values on the fast tier, for all layers and rows together (as
            many rows as come at first).
        attend: the most tokens per KV head that a generated token of a longer row attends to, in whole pages; no more
            than the budget. What is not on the fast tier of these crosses the bus. Default: 4096.
        top: best keys of every query head that are read for certain, where their pages fit what is attended to;
            default: as many as a quarter of that.
        page: tokens a page, a power of two: what is fetched at a time, and a leaf of the tree of bounds. Or a list, one
            for every layer of the model: `page_sizes(model, ids, budget=…)`.
        num_sinks, recent: tokens at the row's begin and end whose pages are always read.
        codec: how a page is stored off the fast tier: "int8", "int4", "fp8", "bf16", or None (as it is).
        disk: folder, which must exist, of the slowest tier, which then holds every page; None: host memory does.
        host_bytes: with a disk, the most that host memory holds of the pages used last, for all layers together.
        ahead: fetch for the next layer by this layer's query; default: with a disk, which takes longer to answer than
            a layer to compute. From host memory, choosing twice takes longer than fetching once.
        compiled: generate in buffers that never move: on a GPU `generate` then compiles the decode step, once, and
            replays it as a CUDA graph. The same is read and kept as without; pages that have become full go home
            between two steps. Read long prompts by `cache.read(ids, chunk=8192)` before: `prefill_chunk_size` would
            compile the chunks too. Not with `disk` or `ahead`, nor on layers with a pattern; `stats(measure=True)`
            then measures nothing.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: options out of range, or a budget that the pages always read fill.
        TierError: a folder that does not exist or cannot be written; later, a full disk.
    """

    places = ("disk", "host_bytes")

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | None = None,
        *,
        gpu_bytes: int | None = None,
        attend: int | None = None,
        top: int | None = None,
        page: int | Sequence[int] = PAGE,
        num_sinks: int = 4,
        recent: int = 64,
        codec: str | None = "int8",
        disk: str | Path | None = None,
        host_bytes: int = 1 << 30,
        ahead: bool | None = None,
        compiled: bool = False,
    ) -> None:
        if budget is not None and gpu_bytes is not None:
            raise ValueError("give budget (tokens of the fast tier) or gpu_bytes, not both")
        check_integer("host_bytes", host_bytes, 0)
        for name, value in (("top", top), ("gpu_bytes", gpu_bytes), ("attend", attend)):
            if value is not None:
                check_integer(name, value, 1)
        if disk is not None and not isinstance(disk, (str, Path)):
            raise ValueError(f"disk={disk!r} must be a folder, such as '/scratch'")
        if ahead is not None:
            check_flag("ahead", ahead)
        if compiled and (disk is not None or ahead):
            raise ValueError("compiled=True fetches from host memory, within the step: leave out disk and ahead")
        base = unwrap(model)
        modules = attention_modules(base)
        sizes = _sizes(page, base.config.num_hidden_layers)
        reads = {size: Reads(ATTEND if budget is None else budget, size, num_sinks, recent) for size in set(sizes)}
        if attend is not None:
            _check_attend(attend, budget, reads.values())
        if disk is not None:
            scratch_file(disk).close()  # said now, rather than after a long prompt's first layer
        stored = codec_named(codec)
        num = max(1, len(full_attention_layers(base.config, modules)))

        def make(index: int) -> TieredLayer:
            pages = partial(TieredPages, sizes[index], stored, disk, host_bytes // num)
            fast_bytes = None if gpu_bytes is None else gpu_bytes // num
            return TieredLayer(reads[sizes[index]], top, pages, attend or ATTEND, fast_bytes, compiled)

        super().__init__(layers=routed_layers(model, "TieredCache", make, compiled))
        self.ahead = disk is not None if ahead is None else ahead
        self._chain()

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        """A copy goes its own way; what both have at home stays where it is, since it never changes."""
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.leave_fixed()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._chain()
        return new

    def _chain(self) -> None:
        mine = [layer for layer in self.layers if isinstance(layer, TieredLayer)]
        for before, layer in pairwise(mine if self.ahead else []):
            layer.follow(before)

    def stats(self, measure: bool = False) -> dict[str, Any]:
        """As every cache of pages, and `proven`: in which share of the searches all pages that may hold one of the
        `top` best keys fitted the budget."""
        told = super().stats(measure)
        layers = [layer for layer in self.layers if isinstance(layer, TieredLayer)]
        searches = sum(x.searches for x in layers)
        return {**told, "proven": sum(int(x.proven) for x in layers) / searches if searches else 1.0}


def _index(top: int | None, fixed: bool, reads: Reads, rows: int) -> TreeIndex:
    return TreeIndex(reads, top, rows, flat=fixed)


def _sizes(page: int | Sequence[int], num_layers: int) -> list[int]:
    """The page size of every layer.

    Raises:
        ValueError: neither a number nor one for each layer.
    """
    if isinstance(page, int):
        return [page] * num_layers
    if not isinstance(page, (list, tuple)) or len(page) != num_layers or not all(type(size) is int for size in page):
        raise ValueError(
            f"page={page!r} must be tokens a page, a power of two, or a list of them, one for each of the model's "
            f"{num_layers} layers: page_sizes(model, ids) of lcpatch.caches.tiered"
        )
    return list(page)


def _check_attend(attend: int, budget: int | float | None, reads: Iterable[Reads]) -> None:
    """Refuse to read more than the fast tier holds, or less than is always read.

    Raises:
        ValueError: `attend` is out of range.
    """
    if is_integer(budget) and attend > budget:
        raise ValueError(f"attend={attend} must be at most budget={budget}: what a token reads must fit the GPU")
    if (least := max(each.least * each.page for each in reads)) > attend:
        raise ValueError(
            f"attend={attend} must hold the pages that are always read and one more: at least {least}, or smaller pages"
        )


class TieredLayer(FixedPages, PagedLayer):
    """One layer.

    Args:
        reads: how many pages the fast tier holds.
        top: best keys to read for certain; None: a quarter of what is read.
        make_pages: an empty store.
        attend: the most tokens that are read of a row that the fast tier does not hold.
        fast_bytes: of keys and values on the fast tier, instead of what `reads` says; None: what it says.
        fixed: generate in buffers that never move, see `fixed_pages`.
    """

    owner = "TieredCache"

    def __init__(
        self,
        reads: Reads,
        top: int | None,
        make_pages: Callable[[], TieredPages],
        attend: int = ATTEND,
        fast_bytes: int | None = None,
        fixed: bool = False,
    ) -> None:
        self.most, self.fast_bytes = attend, fast_bytes
        super().__init__(reads, partial(_index, top, fixed), make_pages, fixed=fixed)

    def _clear(self) -> None:
        super()._clear()
        self.held: int | None = None  # full pages that `fast_bytes` are enough for, at the first step
        self.searches = 0
        self.proven: Tensor | int = 0  # of these, those whose proven pages fitted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.fast_bytes is not None and self.held is None:
            batch, heads, _, head_dim = key_states.shape
            page = self.reads.page
            size = 2 * batch * heads * page * head_dim * key_states.element_size()
            pages = self.fast_bytes // size - 1  # and the open one
            if pages < self.reads.least:
                raise ValueError(
                    f"gpu_bytes leaves {self.fast_bytes} bytes a layer, {max(pages, 0)} pages of {page} tokens for "
                    f"{batch} rows; {self.reads.least} are wanted at least: {size * (self.reads.least + 1)} bytes"
                )
            self.reads, self.held = self.reads.holding(pages), pages
        super().lazy_initialization(key_states, value_states)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = super().state()
        return tensors, numbers | ({} if self.held is None else {"held": self.held})

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """As every paged layer; the fast tier is as large as it was, though rows may have been repeated since."""
        if self.fast_bytes is not None:
            self.held = whole(numbers, "held")
            self.reads = self.reads.holding(self.held)
        super().load_state(tensors, numbers, like)

    def _limits(self, lengths: list[int]) -> list[int]:
        page, most = self.reads.page, max(self.most // self.reads.page, self.reads.least)
        rows = zip(lengths, self.budgets, strict=True)
        return [held if -(-length // page) <= held else min(held, most) for length, held in rows]

    def _take_back(self, taken: int) -> None:
        super()._take_back(taken)
        if self._over():
            self.searches += taken * self.pages.num_heads * len(self.pads)
            self.proven = self.proven + self.index.found
        self.index.found.zero_()

    def _retrieve(self, call: Call) -> tuple[Tensor, Tensor]:
        out = super()._retrieve(call)
        if self._over():
            self.searches += self.index.fits.numel()
            self.proven = self.proven + self.index.fits.sum()
        return out
