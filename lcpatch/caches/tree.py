"""A tree of bounds over one layer's pages of keys: which may hold a query's best keys, and which provably do not.

A leaf is a page: the least and the largest value of every channel of its keys, so that no key of it scores above
sum_d max(q_d low_d, q_d high_d), and none below the same with min. An inner node has the min of its children's mins and
the max of their maxes, and therefore bounds all keys beneath it.

Source: LeoAM, arXiv 2506.20187 (big chunks scored by bounds, only chosen ones split). Ours: several levels, and a rule
that proves what it drops. It goes down level by level instead of node by node, best first, so that a level is one
batched product; every node it visits was at least as good as the k-th lower bound known above it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import page_bounds, page_scores

from .rows import rearranged

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
        self.largest: Tensor | None = None  # magnitude of a key's element so far, [B, K, 1]

    def append(self, keys: Tensor, rows: list[int]) -> None:
        """Take the next pages of `rows`, which have equally many so far: [rows, K, pages * leaf, D]."""
        self.append_bounds(*page_bounds(keys, self.leaf)[:2], rows)

    def reserve(self, leaves: int, like: Tensor) -> None:
        """Room for so many pages; `like` [B, K, 0, D] as the keys."""
        self._reserve(like, leaves)
        if self.largest is None:
            self.largest = like.new_zeros(len(self.leaves), like.shape[1], 1)

    def append_bounds(self, low: Tensor, high: Tensor, rows: list[int]) -> None:
        """The same of pages whose bounds [rows, K, pages, D] are known."""
        begin, stop = self.leaves[rows[0]], self.leaves[rows[0]] + low.shape[2]
        for row in rows:
            self.leaves[row] = stop
        self.reserve(max(self.leaves), low)
        self.largest[rows] = torch.maximum(self.largest[rows], _largest(low, high))
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
        if self.levels:
            self.largest[row] = 0
            if self.leaves[row]:
                self.largest[row] = _largest(*(x[row : row + 1, :, : self.leaves[row]] for x in self.levels[0]))[0]

    def select_rows(self, rows: list[int]) -> None:
        """Keep the batch rows `rows`, in that order; a row may come several times."""
        self.leaves = [self.leaves[r] for r in rows]
        self.levels = [tuple(rearranged(x, rows) for x in level) for level in self.levels]
        self.largest = None if self.largest is None else rearranged(self.largest, rows)

    @property
    def nbytes(self) -> int:
        held = [x for level in self.levels for x in level] + ([] if self.largest is None else [self.largest])
        return sum(x.untyped_storage().nbytes() for x in held)

    def search(self, q: Tensor, tops: list[int]) -> tuple[Tensor, Tensor]:
        """The pages that may hold one of the best keys of any query head: a superset, provably.

        With one level, `pages` are all of them, each in its place, and nothing waits for the device.

        Args:
            q: [B, H, 1, D], rotated; query head h reads KV head h // (H // K).
            tops: how many best keys, of each row.

        Returns:
            `(pages, upper)`: int64 [B, K, M], and the fp32 [B, K, M] upper bound of a page, the largest over the
            group's query heads; -inf where it is ruled out, or no page (-1).
        """
        batch, heads = self.levels[0][0].shape[:2]
        level = len(self.levels) - 1
        nodes = torch.arange(-(-max(self.leaves) // FANOUT**level), device=q.device).expand(batch, heads, -1)
        low, high = (x[:, :, : nodes.shape[2]] for x in self.levels[level])
        while level:
            upper, lower = self._bounds(q, low, high)
            nodes, _ = _kept(nodes, possible(upper, _kth(lower, self._tokens(nodes, level), tops)))
            children = nodes[..., None] * FANOUT + torch.arange(FANOUT, device=q.device)
            nodes, level = children.masked_fill(nodes[..., None] < 0, -1).flatten(2), level - 1
            low, high = (self._pick(level, which, nodes) for which in range(2))
        upper, lower = self._bounds(q, low, high)
        return nodes, possible(upper, _kth_page(lower, [-(-n // self.leaf) for n in tops]))

    def bounds(self, q: Tensor, leaves: int) -> tuple[Tensor, Tensor]:
        """`(upper, lower)` bounds [B, K, H // K, leaves] of the first pages; -inf of those that are not there yet."""
        return self._bounds(q, *(x[:, :, :leaves] for x in self.levels[0]))

    def _pick(self, level: int, which: int, nodes: Tensor) -> Tensor:
        """Bounds of nodes, of those that are none the bounds of an empty page."""
        own = self.levels[level][which]
        found = own.gather(2, nodes.clamp(0, own.shape[2] - 1)[..., None].expand(-1, -1, -1, own.shape[3]))
        return found.masked_fill((self._tokens(nodes, level) == 0)[..., None], -torch.inf if which else torch.inf)

    def _tokens(self, nodes: Tensor, level: int) -> Tensor:
        """Keys beneath nodes, 0 of those that are none."""
        leaves, width = torch.tensor(self.leaves, device=nodes.device)[:, None, None], FANOUT**level
        return (leaves - nodes * width).clamp(0, width).masked_fill(nodes < 0, 0) * self.leaf

    def _bounds(self, q: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """`(upper, lower)` bounds [B, K, H // K, nodes], moved apart by what their sums may have rounded; -inf of empty
        pages."""
        upper, lower = (page_scores(q, low, high, kind=kind) for kind in ("upper", "lower"))
        heads = self.largest.shape[1]
        length = q[:, :, 0].abs().sum(-1, dtype=upper.dtype).unflatten(1, (heads, -1))
        margin = (length * self.largest * (q.shape[-1] * torch.finfo(upper.dtype).eps))[..., None]
        return upper.unflatten(1, (heads, -1)) + margin, lower.unflatten(1, (heads, -1)) - margin

    def _reserve(self, like: Tensor, most: int) -> None:
        """Room for every level's nodes over `most` leaves, and a further level where the highest is too wide."""
        batch, level = len(self.leaves), 0
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


def _largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest magnitude in bounds [B, K, pages, D] of one page at least: [B, K, 1]."""
    return torch.maximum(low.abs(), high.abs()).amax((2, 3))[..., None]


def possible(upper: Tensor, bound: Tensor) -> Tensor:
    """Of nodes that reach the bound of a query head, the largest upper bound of their group's; of others, -inf.

    upper [B, K, G, M], bound [B, K, G] -> [B, K, M].
    """
    return torch.where((upper >= bound[..., None]).any(2), upper.amax(2), -torch.inf)


def _kept(nodes: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """What is not ruled out, in its order, then -1 and -inf."""
    keep = upper > -torch.inf
    most = max(int(keep.sum(-1).max()), 1)
    order = keep.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
    return nodes.masked_fill(~keep, -1).gather(-1, order), upper.gather(-1, order)


def _kth(lower: Tensor, tokens: Tensor, tops: list[int]) -> Tensor:
    """The largest bound that `tops` tokens of each row reach: every token of a node scores at least its lower bound.

    lower [B, K, G, M], tokens [B, K, M] -> [B, K, G]; -inf where there are fewer tokens.
    """
    wanted = torch.tensor(tops, device=lower.device)[:, None, None, None]
    bound, order = lower.sort(-1, descending=True)
    reached = tokens[:, :, None].expand_as(lower).gather(-1, order).cumsum(-1) >= wanted
    first = reached.int().argmax(-1, keepdim=True)
    return bound.gather(-1, first).squeeze(-1).masked_fill(~reached[..., -1], -torch.inf)


def _kth_page(lower: Tensor, counts: list[int]) -> Tensor:
    """The same of pages, which are full: the bound of each row's `counts` best."""
    most = max(counts)
    if most > lower.shape[-1]:
        lower = pad(lower, (0, most - lower.shape[-1]), value=-torch.inf)
    best = lower.topk(most, -1).values
    if min(counts) == most:
        return best[..., -1]
    last = torch.tensor(counts, device=lower.device)[:, None, None, None] - 1
    return best.gather(-1, last.expand(*best.shape[:3], 1)).squeeze(-1)
