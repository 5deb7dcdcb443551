"""A tree of bounds over one layer's keys: which pages may hold a query's best keys, and which provably do not.

A leaf is a page: the least and the largest value of every channel of its keys, so that no key of it scores above
sum_d max(q_d low_d, q_d high_d), and none below the same with min. An inner node has the min of its children's mins and
the max of their maxes, and therefore bounds all keys beneath it.

Source: LeoAM, arXiv 2506.20187 (big chunks scored by bounds, only chosen ones split). Ours: several levels, and a rule
that proves what it drops. It goes down level by level instead of node by node, best first, so that a level is one
batched product; every node it visits that best-first would not have was at least as good as the k-th lower bound then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import page_bounds, page_scores

FANOUT = 8  # children a node: 128K tokens in leaves of 32 are four levels, the highest of 8 nodes
TOP = 16  # nodes of a level that needs no parents
GRAIN = 256  # leaves by which a level grows at least


@dataclass
class BoundTree:
    """Bounds of the pages of a layer, [B, K, nodes, D] a level, leaves first.

    Args:
        leaf: keys a leaf.
        pads: int64 [B], positions before a row's first token; None: no padding.
    """

    leaf: int = 32
    pads: Tensor | None = None
    seen: int = 0
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def append(self, k: Tensor) -> None:
        """Take the next keys, [B, K, T, D] in order of position, into their leaves and those leaves' parents."""
        offset, begin, end = self.seen % self.leaf, self.seen // self.leaf, self.seen + k.shape[2]
        within = None
        if offset or self.pads is not None:
            first = torch.full((k.shape[0],), offset, device=k.device)
            if self.pads is not None:
                first = torch.maximum(first, self.pads - begin * self.leaf).clamp(max=offset + k.shape[2])
            within = torch.stack([first, torch.full_like(first, offset + k.shape[2])], 1).int()
        low, high, _ = page_bounds(pad(k, (0, 0, offset, 0)) if offset else k, self.leaf, bounds=within)
        self.seen = end
        self._reserve(low)
        stop = begin + low.shape[2]
        least, most = (x[:, :, begin:stop] for x in self.levels[0])
        least.copy_(torch.minimum(least, low))
        most.copy_(torch.maximum(most, high))
        self._lift(begin, stop)

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on. A leaf that is cut keeps its bounds, which then hold with room."""
        stop = -(-self.seen // self.leaf)
        self.seen = length
        begin = self.num_leaves
        if begin < stop:
            self.levels[0][0][:, :, begin:stop] = torch.inf
            self.levels[0][1][:, :, begin:stop] = -torch.inf
            self._lift(begin, stop)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order; a row may come several times."""
        self.levels = [tuple(x.index_select(0, rows.to(x.device)) for x in level) for level in self.levels]
        self.pads = None if self.pads is None else self.pads.index_select(0, rows.to(self.pads.device))

    @property
    def num_leaves(self) -> int:
        return -(-self.seen // self.leaf)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for level in self.levels for x in level)

    def search(self, q: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The leaves that may hold one of the `top` best keys of any query head: a superset, provably.

        Args:
            q: [B, H, 1, D], rotated; query head h reads KV head h // (H // K).
            top: how many keys.

        Returns:
            `(leaves, upper)`: int64 [B, K, M], -1 where a head has fewer, and the fp32 [B, K, M] upper bound of a leaf,
            the largest over the group's query heads; -inf where there is no leaf.
        """
        batch, heads = self.levels[0][0].shape[:2]
        nodes = torch.arange(self._num_nodes(len(self.levels) - 1), device=q.device).expand(batch, heads, -1)
        for level in reversed(range(len(self.levels))):
            upper, lower = self._scores(q, nodes, level)
            keep = (upper >= _kth(lower, self._counts(nodes, level), top)[..., None]).any(2)
            keep &= self._counts(nodes, level) > 0
            upper = upper.amax(2).masked_fill(~keep, -torch.inf)
            most = max(int(keep.sum(-1).max()), 1)
            order = keep.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
            nodes, upper = nodes.masked_fill(~keep, -1).gather(-1, order), upper.gather(-1, order)
            if level:
                children = nodes[..., None] * FANOUT + torch.arange(FANOUT, device=q.device)
                nodes = torch.where(nodes[..., None] >= 0, children, -1).flatten(2)
        return nodes, upper

    def _scores(self, q: Tensor, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """`(upper, lower)` bounds [B, K, H // K, nodes], moved apart by what their sums may have rounded."""
        low, high = self.levels[level]
        index = nodes.clamp(min=0)[..., None].expand(-1, -1, -1, low.shape[-1])
        low, high = low.gather(2, index), high.gather(2, index)
        upper, lower = (page_scores(q, low, high, kind=kind) for kind in ("upper", "lower"))
        largest = torch.maximum(low.abs(), high.abs()).nan_to_num(posinf=0).amax((2, 3)).to(upper.dtype)
        eps = torch.finfo(upper.dtype).eps
        margin = q.shape[-1] * eps * q[:, :, 0].to(upper.dtype).abs().sum(-1)
        margin = margin.unflatten(1, (low.shape[1], -1)) * largest[..., None]
        upper, lower = (x.unflatten(1, (low.shape[1], -1)) for x in (upper, lower))
        gone = (nodes < 0)[:, :, None]
        upper, lower = upper + margin[..., None], lower - margin[..., None]
        return upper.masked_fill(gone, -torch.inf), lower.masked_fill(gone, -torch.inf)

    def _counts(self, nodes: Tensor, level: int) -> Tensor:
        """Tokens beneath each node [B, K, nodes]; 0 for a node of -1."""
        width = self.leaf * FANOUT**level
        begin, end = nodes * width, ((nodes + 1) * width).clamp(max=self.seen)
        if self.pads is not None:
            begin = torch.maximum(begin, self.pads[:, None, None])
        return (end - begin).clamp(min=0).masked_fill(nodes < 0, 0)

    def _num_nodes(self, level: int) -> int:
        return -(-self.num_leaves // FANOUT**level)

    def _reserve(self, like: Tensor) -> None:
        """Room for every level's nodes, and a further level where the highest has more than `TOP`."""
        level = 0
        while level == 0 or self._num_nodes(level - 1) > TOP:
            needed = -(-self._num_nodes(level) // FANOUT) * FANOUT
            if level == len(self.levels):
                self.levels.append(tuple(like.new_empty(*like.shape[:2], 0, like.shape[3]) for _ in range(2)))
                fresh = level > 0
            else:
                fresh = False
            filled = self.levels[level][0].shape[2]
            if needed > filled:
                room = max(needed, filled + filled // 2, -(-GRAIN // FANOUT**level) * FANOUT) - filled
                room = -(-room // FANOUT) * FANOUT
                least, most = self.levels[level]
                self.levels[level] = (
                    pad(least, (0, 0, 0, room), value=torch.inf),
                    pad(most, (0, 0, 0, room), value=-torch.inf),
                )
            if fresh:
                self._lift_to(level, 0, self._num_nodes(level))
            level += 1

    def _lift(self, begin: int, stop: int) -> None:
        """Bring the parents of the leaves [begin, stop) up to date, level by level."""
        for level in range(1, len(self.levels)):
            begin, stop = begin // FANOUT, -(-stop // FANOUT)
            self._lift_to(level, begin, stop)

    def _lift_to(self, level: int, begin: int, stop: int) -> None:
        for own, below, reduce in zip(
            self.levels[level], self.levels[level - 1], (Tensor.amin, Tensor.amax), strict=True
        ):
            children = below[:, :, begin * FANOUT : stop * FANOUT]
            missing = (stop - begin) * FANOUT - children.shape[2]
            if missing:
                children = pad(children, (0, 0, 0, missing), value=torch.inf if reduce is Tensor.amin else -torch.inf)
            own[:, :, begin:stop] = reduce(children.unflatten(2, (-1, FANOUT)), 3)


def _kth(lower: Tensor, counts: Tensor, top: int) -> Tensor:
    """The largest bound that `top` tokens reach: every token of a node scores at least its lower bound.

    lower [B, K, G, M], counts [B, K, M] -> [B, K, G]; -inf where there are fewer tokens.
    """
    bound, order = lower.sort(-1, descending=True)
    reached = counts[:, :, None].expand_as(lower).gather(-1, order).cumsum(-1) >= top
    first = reached.int().argmax(-1, keepdim=True)
    return bound.gather(-1, first).squeeze(-1).masked_fill(~reached.any(-1), -torch.inf)
