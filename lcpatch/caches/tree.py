"""A tree of bounds over one layer's pages of keys: which may hold a query's best keys, and which provably do not.

A leaf is a page: the least and the largest value of every channel of its keys, so that no key of it scores above
sum_d max(q_d low_d, q_d high_d), and none below the same with min. An inner node has the min of its children's mins and
the max of their maxes, and therefore bounds all keys beneath it.

Source: LeoAM, arXiv 2506.20187 (big chunks scored by bounds, only chosen ones split). Ours: several levels, and a rule
that proves what it drops. It goes down level by level instead of node by node, best first, so that a level is one
batched product; every node it visits was at least as good as the k-th lower bound known above it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import page_bounds, page_scores

if TYPE_CHECKING:
    from .paged import Marks, Reads

FANOUT = 8  # children a node: 128K tokens in leaves of 32 are four levels, the highest of 8 nodes
WIDEST = 16  # nodes of a level that needs no parents
WIDEST_CUDA = 8192  # there, scoring a wide level is one launch, and going down a level ten
GRAIN = 256  # leaves by which the lowest level grows at least


class BoundTree:
    """Bounds of full pages of `leaf` keys, [B, K, nodes, D] a level, leaves first.

    Args:
        leaf: keys a page.
        num_rows: batch rows, which may have different numbers of pages.
        widest: nodes of a level that needs no parents; None: what suits the device.
    """

    def __init__(self, leaf: int, num_rows: int, widest: int | None = None) -> None:
        self.leaf, self.widest = leaf, widest
        self.leaves = [0] * num_rows
        self.levels: list[tuple[Tensor, Tensor]] = []

    def append(self, keys: Tensor, rows: list[int]) -> None:
        """Take the next pages of `rows`, which have equally many so far: [rows, K, pages * leaf, D]."""
        low, high, _ = page_bounds(keys, self.leaf)
        begin, stop = self.leaves[rows[0]], self.leaves[rows[0]] + low.shape[2]
        for row in rows:
            self.leaves[row] = stop
        self._reserve(low)
        for own, new in zip(self.levels[0], (low, high), strict=True):
            own[rows, :, begin:stop] = new
        for level in range(1, len(self.levels)):
            begin, stop = begin // FANOUT, -(-stop // FANOUT)
            self._lift(level, rows, begin, stop)

    def cut(self, row: int, leaves: int) -> None:
        """Forget the pages of `row` from `leaves` on. A parent that is cut keeps its bounds, which hold with room."""
        self.leaves[row] = min(self.leaves[row], leaves)
        for level, (low, high) in enumerate(self.levels):
            first = -(-self.leaves[row] // FANOUT**level)
            low[row, :, first:], high[row, :, first:] = torch.inf, -torch.inf

    def select_rows(self, rows: list[int]) -> None:
        """Keep the batch rows `rows`, in that order; a row may come several times."""
        self.leaves = [self.leaves[r] for r in rows]
        self.levels = [tuple(x[rows] for x in level) for level in self.levels]

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for level in self.levels for x in level)

    def search(self, q: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The pages that may hold one of the `top` best keys of any query head: a superset, provably.

        Args:
            q: [B, H, 1, D], rotated; query head h reads KV head h // (H // K).
            top: how many keys.

        Returns:
            `(pages, upper)`: int64 [B, K, M], in order, then -1 where a head has fewer, and the fp32 [B, K, M] upper
            bound of a page, the largest over the group's query heads; -inf where there is no page.
        """
        batch, heads = self.levels[0][0].shape[:2]
        leaves = torch.tensor(self.leaves, device=q.device)[:, None, None]
        highest = len(self.levels) - 1
        nodes = torch.arange(-(-max(self.leaves) // FANOUT**highest), device=q.device).expand(batch, heads, -1)
        for level in reversed(range(len(self.levels))):
            width = FANOUT**level
            tokens = (leaves - nodes * width).clamp(0, width).masked_fill(nodes < 0, 0) * self.leaf
            upper, lower = self._scores(q, nodes, level, tokens == 0)
            keep = (upper >= _kth(lower, tokens, top)[..., None]).any(2) & (tokens > 0)
            upper = upper.amax(2).masked_fill(~keep, -torch.inf)
            most = max(int(keep.sum(-1).max()), 1)
            order = keep.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
            nodes, upper = nodes.masked_fill(~keep, -1).gather(-1, order), upper.gather(-1, order)
            if level:
                children = nodes[..., None] * FANOUT + torch.arange(FANOUT, device=q.device)
                nodes = torch.where(nodes[..., None] >= 0, children, -1).flatten(2)
        return nodes, upper

    def _scores(self, q: Tensor, nodes: Tensor, level: int, empty: Tensor) -> tuple[Tensor, Tensor]:
        """`(upper, lower)` bounds [B, K, H // K, nodes], moved apart by what their sums may have rounded."""
        low, high = self.levels[level]
        index = nodes.clamp(min=0, max=low.shape[2] - 1)[..., None].expand(-1, -1, -1, low.shape[-1])
        low, high = low.gather(2, index), high.gather(2, index)
        upper, lower = (
            page_scores(q, low, high, kind=kind).unflatten(1, (low.shape[1], -1)) for kind in ("upper", "lower")
        )
        largest = torch.maximum(low.abs(), high.abs()).masked_fill(empty[..., None], 0).amax((2, 3)).to(upper.dtype)
        length = q[:, :, 0].to(upper.dtype).abs().sum(-1).unflatten(1, (low.shape[1], -1))
        margin = q.shape[-1] * torch.finfo(upper.dtype).eps * length * largest[..., None]
        upper, lower = upper + margin[..., None], lower - margin[..., None]
        return (x.masked_fill(empty[:, :, None], -torch.inf) for x in (upper, lower))

    def _reserve(self, like: Tensor) -> None:
        """Room for every level's nodes, and a further level where the highest is too wide."""
        batch, most, level = len(self.leaves), max(self.leaves), 0
        widest = self.widest or (WIDEST_CUDA if like.is_cuda else WIDEST)
        while level == 0 or -(-most // FANOUT ** (level - 1)) > widest:
            needed = -(-most // FANOUT**level)
            fresh = level == len(self.levels)
            if fresh:
                self.levels.append(tuple(like.new_empty(batch, like.shape[1], 0, like.shape[3]) for _ in range(2)))
            filled = self.levels[level][0].shape[2]
            if needed > filled:
                room = -(-max(needed, filled + filled // 2, GRAIN // FANOUT**level) // FANOUT) * FANOUT - filled
                low, high = self.levels[level]
                self.levels[level] = (
                    pad(low, (0, 0, 0, room), value=torch.inf),
                    pad(high, (0, 0, 0, room), value=-torch.inf),
                )
            if fresh and level:
                self._lift(level, list(range(batch)), 0, self.levels[level - 1][0].shape[2] // FANOUT)
            level += 1

    def _lift(self, level: int, rows: list[int], begin: int, stop: int) -> None:
        """Make the nodes [begin, stop) of a level the bounds of their children, all of which have their place."""
        for n, reduce in enumerate((Tensor.amin, Tensor.amax)):
            own, below = self.levels[level][n], self.levels[level - 1][n]
            stop = min(stop, own.shape[2])
            children = below[rows, :, begin * FANOUT : stop * FANOUT]
            own[rows, :, begin:stop] = reduce(children.unflatten(2, (-1, FANOUT)), 3)


class TreeIndex:
    """The tree of bounds of a layer's pages, and what it proves.

    Args:
        reads: which pages are read anyway.
        top: best keys to find; None: a quarter of the tokens read.
        num_rows: batch rows.
    """

    def __init__(self, reads: Reads, top: int | None, num_rows: int) -> None:
        self.reads, self.top = reads, top
        self.tree = BoundTree(reads.page, num_rows)
        self.fits: Tensor | None = None  # bool [B, K]: whether all that the last search could not drop may be read

    def append(self, keys: Tensor, rows: list[int], begin: int, room: int) -> None:
        self.tree.append(keys, rows)

    def scores(self, query: Tensor, marks: Marks, scale: float | None) -> Tensor:
        """The upper bounds of the pages that may hold one of the best keys; -inf for those that provably do not."""
        top = self.top or max(marks.chosen * self.reads.page // 4, 1)
        pages, upper = self.tree.search(query, top)
        scores = upper.new_full((*upper.shape[:2], marks.most + 1), -torch.inf)
        scores.scatter_(2, torch.where((pages >= 0) & (pages < marks.most), pages, marks.most), upper)
        scores = scores[..., : marks.most]
        place = torch.arange(marks.most, device=scores.device)
        read = (scores > -torch.inf) | (place < self.reads.sink_pages) | (place >= marks.recent)
        self.fits = (read & (place < marks.newest)).sum(-1) < marks.budgets[..., 0]
        return scores

    def cut(self, row: int, pages: int) -> None:
        self.tree.cut(row, pages)

    def select_rows(self, rows: list[int]) -> None:
        self.tree.select_rows(rows)

    @property
    def nbytes(self) -> int:
        return self.tree.nbytes


def _kth(lower: Tensor, tokens: Tensor, top: int) -> Tensor:
    """The largest bound that `top` tokens reach: every token of a node scores at least its lower bound.

    lower [B, K, G, M], tokens [B, K, M] -> [B, K, G]; -inf where there are fewer tokens.
    """
    bound, order = lower.sort(-1, descending=True)
    reached = tokens[:, :, None].expand_as(lower).gather(-1, order).cumsum(-1) >= top
    first = reached.int().argmax(-1, keepdim=True)
    return bound.gather(-1, first).squeeze(-1).masked_fill(~reached.any(-1), -torch.inf)
