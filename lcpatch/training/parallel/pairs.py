"""The core of ring, lightseq and tokenring: attention of every rank's queries over every rank's keys, pair by pair.

A schedule says in which step which rank computes which pair, and that alone tells what travels: a pair computed where
its queries live gets the keys there; one computed where its keys live gets the queries there and sends the result home.

    forward     queries' home:  K, V ->                      keys' home:  Q ->              <- out, LSE
    backward    queries' home:  K, V ->       <- dK, dV      keys' home:  Q, dO, LSE, delta ->       <- dQ

Results of a row's pairs are merged by their LSEs. Backward runs each pair with the merged LSE, from which its
probabilities are those of the whole row, so gradients simply add up. Inputs of the next step travel while one computes.

Each tensor goes straight from its owner to who needs it, not hand to hand around a ring: the same bytes, and none where
causality or packing leaves nothing to compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import DENSE, BlockSparseSpec, block_sparse
from lcpatch_kernels.block_sparse import block_sparse_backward

from ...hf.watch import Call
from .layout import Documents, Layout, Shard, sees
from .link import Link, Message
from .strategy import Strategy, Volume, Work, bounds_tensor


class Pair(NamedTuple):
    """Attention of rank `q`'s queries over rank `kv`'s keys, computed by rank `at`: one of the two."""

    q: int
    kv: int
    at: int

    @property
    def other(self) -> int:
        """The rank whose tensors travel; `at` itself for a rank with itself."""
        return self.kv if self.at == self.q else self.q


Schedule = list[list[Pair]]
"""Step by step what is computed; in a step each rank computes at most one pair."""


class Piece(NamedTuple):
    """What a pair computes: `calls` (see `layout.sees`, for each batch row) within spans of the two ranks' tokens."""

    queries: slice
    keys: slice
    calls: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]

    def bounds(self, device: torch.device) -> list[Tensor]:
        """The calls as `block_sparse` takes them."""
        return [_bounds(call, str(device)) for call in self.calls]


class Pairwise(Strategy):
    """A strategy that is a schedule."""

    layouts: ClassVar[tuple[str, ...]]
    """The layouts that it computes completely."""

    @abstractmethod
    def schedule(self, num_ranks: int) -> Schedule:
        """Every pair that causal attention may need, once."""

    def problem(self, work: Work) -> str | None:
        if any(work.spec.rules[r] != DENSE for r in work.spec.head_rules):
            return "it is for dense layers; 'halo' sends a pattern's keys only"
        if work.layout.name not in self.layouts:
            return f"it needs layout {' or '.join(map(repr, self.layouts))}, not {work.layout.name!r}"
        return None

    def attend(self, call: Call, shard: Shard, link: Link) -> tuple[Tensor, Tensor]:
        return _Attend.apply(call.query, call.key, call.value, self, call, shard, link)

    def plan(self, layout: Layout, documents: Documents) -> list[dict[Pair, Piece]]:
        """The schedule's steps, without what sees nothing."""
        return _plan(type(self), layout, documents)

    def volume(self, work: Work) -> Volume:
        forward, backward = [0] * work.layout.num_ranks, [0] * work.layout.num_ranks
        rows = len(work.documents)
        key = rows * work.num_kv_heads * work.head_dim * work.itemsize
        query = rows * work.num_heads * work.head_dim * work.itemsize
        lse = rows * work.num_heads * work.lse_size
        for step in self.plan(work.layout, work.documents):
            for pair, piece in step.items():
                if pair.q == pair.kv:
                    continue
                num_q, num_k = size(piece.queries), size(piece.keys)
                if pair.at == pair.q:
                    forward[pair.kv] += 2 * num_k * key
                    backward[pair.kv] += 2 * num_k * key
                    backward[pair.q] += 2 * num_k * key
                else:
                    forward[pair.q] += num_q * query
                    forward[pair.kv] += num_q * (query + lse)
                    backward[pair.q] += num_q * (2 * query + 2 * lse)
                    backward[pair.kv] += num_q * query
        return Volume(tuple(forward), tuple(backward))


@lru_cache(maxsize=64)  # the layers of a batch, their backward and its recomputation
def _plan(strategy: type[Pairwise], layout: Layout, documents: Documents) -> list[dict[Pair, Piece]]:
    steps = []
    for step in strategy().schedule(layout.num_ranks):
        pieces = {pair: _piece(layout, documents, pair) for pair in step}
        steps.append({pair: piece for pair, piece in pieces.items() if piece is not None})
    return steps


@lru_cache(maxsize=1024)
def _bounds(call: tuple[tuple[tuple[int, ...], ...], ...], device: str) -> Tensor:
    return bounds_tensor(call, 5, torch.device(device))


def _piece(layout: Layout, documents: Documents, pair: Pair) -> Piece | None:
    rows = [sees(layout, row, pair.q, pair.kv) for row in documents]
    segments = [s for row in rows for call in row for s in call]
    if not segments:
        return None
    q0, q1 = min(s[0] for s in segments), max(s[1] for s in segments)
    k0, k1 = min(s[2] for s in segments), max(s[3] for s in segments)
    calls = tuple(
        tuple(tuple(_within(s, q0, k0) for s in (row[n] if n < len(row) else ())) for row in rows)
        for n in range(max(map(len, rows)))
    )
    return Piece(slice(q0, q1), slice(k0, k1), calls)


def _within(segment: tuple[int, ...], q0: int, k0: int) -> tuple[int, ...]:
    return segment[0] - q0, segment[1] - q0, segment[2] - k0, segment[3] - k0, segment[4]


class _Walk(ABC):
    """One rank's way through the steps of a forward or a backward. Sums are kept in `wide` precision."""

    def __init__(self, strategy: Pairwise, call: Call, shard: Shard, link: Link) -> None:
        self.link, self.rank = link, shard.rank
        self.steps = strategy.plan(shard.layout, shard.documents)
        self.spec = BlockSparseSpec.of([DENSE] * call.query.shape[1])
        self.options = {"scale": call.scale, "softcap": call.softcap, "impl": call.impl}
        self.k, self.v = call.key, call.value

    @abstractmethod
    def rows(self, queries: slice) -> list[Tensor]:
        """What must be known of these queries to compute with them."""

    @abstractmethod
    def compute(self, piece: Piece, rows: Sequence[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """A pair's results for the queries' rank and for the keys' rank."""

    @abstractmethod
    def empty(self, piece: Piece, *, for_queries: bool) -> list[Tensor]:
        """Buffers for one of the two."""

    @abstractmethod
    def absorb(self, piece: Piece, results: list[Tensor], *, for_queries: bool) -> None:
        """Take in one of the two."""

    def walk(self) -> None:
        """Go through the steps. Every rank posts its transfers in the same order: inputs one step ahead, results."""
        arrived = self._post(0)
        home: Callable[[], None] | None = None
        for n, step in enumerate(self.steps):
            inputs = arrived()
            arrived = self._post(n + 1)
            sends: list[Message] = []
            waiting: list[tuple[Piece, list[Tensor], bool]] = []
            receives: list[Message] = []
            for pair, piece in step.items():
                if pair.at == self.rank:
                    sends += self._do(pair, piece, inputs)
                elif pair.other == self.rank:
                    buffers = self.empty(piece, for_queries=pair.q == self.rank)
                    receives += [(x, pair.at) for x in buffers]
                    waiting.append((piece, buffers, pair.q == self.rank))
            if home is not None:
                home()  # the last step's results had this step's time to travel
            home = self._absorber(self.link.transfer(sends, receives), waiting)
        if home is not None:
            home()

    def _do(self, pair: Pair, piece: Piece, inputs: list[Tensor]) -> list[Message]:
        rows = self.rows(piece.queries) if pair.q == self.rank else inputs
        k, v = (x[:, :, piece.keys] for x in (self.k, self.v)) if pair.kv == self.rank else inputs[0]
        of_queries, of_keys = self.compute(piece, rows, k, v)
        sends: list[Message] = []
        for results, owner, for_queries in ((of_queries, pair.q, True), (of_keys, pair.kv, False)):
            if owner == self.rank:
                self.absorb(piece, results, for_queries=for_queries)
            else:
                like = self.empty(piece, for_queries=for_queries)
                sends += [(x.to(y.dtype), owner) for x, y in zip(results, like, strict=True)]
        return sends

    def _post(self, n: int) -> Callable[[], list[Tensor]]:
        """Start the transfers of step n's inputs; the result waits for them and returns this rank's."""
        sends: list[Message] = []
        mine: list[Tensor] = []
        peer = self.rank
        for pair, piece in self.steps[n].items() if n < len(self.steps) else ():
            home = pair.at == pair.q  # then the keys travel
            if pair.at == self.rank != pair.other:
                peer = pair.other
                mine = [self._keys(piece.keys, new=True)] if home else [_like(x, piece) for x in self.rows(slice(0, 0))]
            elif pair.other == self.rank != pair.at:
                inputs = [self._keys(piece.keys)] if home else self.rows(piece.queries)
                sends += [(x, pair.at) for x in inputs]
        wait = self.link.transfer(sends, [(x, peer) for x in mine])

        def arrived() -> list[Tensor]:
            wait()
            return mine

        return arrived

    def _keys(self, keys: slice, new: bool = False) -> Tensor:
        """K and V in one tensor [2, B, K, n, D]; with `new` a buffer for another rank's."""
        if new:
            batch, heads, _, dim = self.k.shape
            return self.k.new_empty(2, batch, heads, size(keys), dim)
        return torch.stack([self.k[:, :, keys], self.v[:, :, keys]])

    def _absorber(self, wait: Callable[[], None], waiting: list[tuple[Piece, list[Tensor], bool]]) -> Callable:
        def take() -> None:
            wait()
            for piece, buffers, for_queries in waiting:
                if buffers:
                    self.absorb(piece, buffers, for_queries=for_queries)

        return take


class _Forward(_Walk):
    def __init__(self, strategy: Pairwise, call: Call, shard: Shard, link: Link) -> None:
        super().__init__(strategy, call, shard, link)
        self.q = call.query
        self.out = torch.zeros(self.q.shape, dtype=wide(self.q), device=self.q.device)
        self.lse = torch.full(self.q.shape[:3], -torch.inf, dtype=wide(self.q), device=self.q.device)

    def rows(self, queries: slice) -> list[Tensor]:
        return [self.q[:, :, queries]]

    def compute(self, piece: Piece, rows: Sequence[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        (q,) = rows
        out, lse = None, None
        for bounds in piece.bounds(q.device):
            part = block_sparse(q, k, v, self.spec, bounds=bounds, **self.options)
            if out is None:
                out, lse = part[0].to(wide(q)), part[1]
            else:
                merge_into(out, lse, *part)
        return [out, lse], []

    def empty(self, piece: Piece, *, for_queries: bool) -> list[Tensor]:
        return [_like(self.q, piece), _like(self.lse, piece)] if for_queries else []

    def absorb(self, piece: Piece, results: list[Tensor], *, for_queries: bool) -> None:
        if for_queries:
            merge_into(self.out[:, :, piece.queries], self.lse[:, :, piece.queries], *results)


class _Backward(_Walk):
    def __init__(
        self, strategy: Pairwise, call: Call, shard: Shard, link: Link, grad_out: Tensor, lse: Tensor, delta: Tensor
    ) -> None:
        super().__init__(strategy, call, shard, link)
        self.of_rows = (call.query, grad_out, lse, delta)
        self.dq, self.dk, self.dv = (
            torch.zeros(x.shape, dtype=wide(x), device=x.device) for x in (call.query, call.key, call.value)
        )

    def rows(self, queries: slice) -> list[Tensor]:
        return [x[:, :, queries] for x in self.of_rows]

    def compute(self, piece: Piece, rows: Sequence[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        q, grad_out, lse, delta = rows
        given = (grad_out, -delta, q, k, v, torch.zeros_like(grad_out), lse, self.spec)  # delta stands for the output
        parts = [block_sparse_backward(*given, bounds=bounds, **self.options) for bounds in piece.bounds(q.device)]
        dq, dk, dv = (sum(x) for x in zip(*parts, strict=True))
        return [dq], [torch.stack([dk, dv])]

    def empty(self, piece: Piece, *, for_queries: bool) -> list[Tensor]:
        return [_like(self.of_rows[0], piece)] if for_queries else [self._keys(piece.keys, new=True)]

    def absorb(self, piece: Piece, results: list[Tensor], *, for_queries: bool) -> None:
        if for_queries:
            self.dq[:, :, piece.queries] += results[0]
        else:
            self.dk[:, :, piece.keys] += results[0][0]
            self.dv[:, :, piece.keys] += results[0][1]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, strategy: Pairwise, call: Call, shard: Shard, link: Link
    ) -> tuple[Tensor, Tensor]:
        walk = _Forward(strategy, call._replace(query=q, key=k, value=v), shard, link)
        walk.walk()
        out = walk.out.to(q.dtype)
        ctx.given = strategy, call._replace(query=None, key=None, value=None), shard, link
        ctx.save_for_backward(q, k, v, out, walk.lse)
        return out, walk.lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        strategy, call, shard, link = ctx.given
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
        call = call._replace(query=q, key=k, value=v)
        walk = _Backward(strategy, call, shard, link, grad_out.to(q.dtype), lse, delta)
        walk.walk()
        return *(g.to(q.dtype) for g in (walk.dq, walk.dk, walk.dv)), None, None, None, None


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge, in place, attention over other keys into `out` [B, H, T, D] and `lse` [B, H, T].

    l = logaddexp(lse, lse'),  out = out e^(lse - l) + out' e^(lse' - l); a row that saw nothing has 0 and -inf.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == -torch.inf, 0)  # -inf - -inf is NaN
    out.mul_((lse - safe).exp()[..., None]).add_(other * (other_lse - safe).exp()[..., None])
    lse.copy_(total)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def size(span: slice) -> int:
    """Tokens of a span."""
    return span.stop - span.start


def _like(x: Tensor, piece: Piece) -> Tensor:
    """A buffer for the piece's rows of another rank's `x` [B, H, t, ...]."""
    return x.new_empty(*x.shape[:2], size(piece.queries), *x.shape[3:])
