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

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import DENSE, BlockSparseSpec, block_sparse
from lcpatch_kernels.block_sparse import block_sparse_backward

from ...hf.watch import Call
from .layout import Layout, Shard, sees
from .link import Link
from .strategy import Strategy, Volume, Work, bounds_tensor


class Pair(NamedTuple):
    """Attention of rank `q`'s queries over rank `kv`'s keys, computed by rank `at`: one of the two."""

    q: int
    kv: int
    at: int


Schedule = list[list[Pair]]
"""Step by step what is computed; in a step each rank computes at most one pair."""


class Piece(NamedTuple):
    """What a pair computes: `calls` (see `layout.sees`, for each batch row) within spans of the two ranks' tokens."""

    queries: slice
    keys: slice
    calls: list[list[list[tuple[int, ...]]]]


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
        return _Attend.apply(call.query, call.key, call.value, _Run(self, call, shard, link))

    def plan(self, layout: Layout, documents: Any) -> list[dict[Pair, Piece]]:
        """The schedule's steps, without what sees nothing."""
        steps = []
        for step in self.schedule(layout.num_ranks):
            pieces = {pair: _piece(layout, documents, pair) for pair in step}
            steps.append({pair: piece for pair, piece in pieces.items() if piece is not None})
        return steps

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
                num_q, num_k = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
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


def _piece(layout: Layout, documents: Any, pair: Pair) -> Piece | None:
    rows = [sees(layout, row, pair.q, pair.kv) for row in documents]
    segments = [s for row in rows for call in row for s in call]
    if not segments:
        return None
    q0, q1 = min(s[0] for s in segments), max(s[1] for s in segments)
    k0, k1 = min(s[2] for s in segments), max(s[3] for s in segments)
    calls = []
    for n in range(max(map(len, rows))):
        calls.append([[_within(s, q0, k0) for s in (row[n] if n < len(row) else [])] for row in rows])
    return Piece(slice(q0, q1), slice(k0, k1), calls)


def _within(segment: tuple[int, ...], q0: int, k0: int) -> tuple[int, ...]:
    return segment[0] - q0, segment[1] - q0, segment[2] - k0, segment[3] - k0, segment[4]


class _Run:
    """One layer's attention on one rank: its plan, and what a pair computes."""

    def __init__(self, strategy: Pairwise, call: Call, shard: Shard, link: Link) -> None:
        self.link, self.rank = link, shard.rank
        self.steps = strategy.plan(shard.layout, shard.documents)
        self.spec = BlockSparseSpec.of([DENSE] * call.query.shape[1])
        self.options = {"scale": call.scale, "softcap": call.softcap, "impl": call.impl}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`(out, lse)` of this rank's queries, both in `wide` precision."""
        out = torch.zeros(q.shape, dtype=wide(q), device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide(q), device=q.device)

        def inputs(pair: Pair, piece: Piece) -> list[Tensor]:
            return [_both(k, v, piece.keys)] if pair.at == pair.q else [q[:, :, piece.queries].contiguous()]

        def expect(pair: Pair, piece: Piece) -> list[Tensor]:
            num_q, num_k = _size(piece.queries), _size(piece.keys)
            if pair.at == pair.q:
                return [k.new_empty(2, *k.shape[:2], num_k, k.shape[3])]
            return [q.new_empty(*q.shape[:2], num_q, q.shape[3])]

        def compute(pair: Pair, piece: Piece, got: list[Tensor]) -> list[Tensor]:
            at_home = pair.at == pair.q
            q_ = q[:, :, piece.queries] if at_home else got[0]
            k_, v_ = (k[:, :, piece.keys], v[:, :, piece.keys]) if pair.at == pair.kv else got[0]
            part = self._attend(piece, q_, k_, v_)
            if not at_home:
                return [part[0].to(q.dtype).contiguous(), part[1].contiguous()]
            merge_into(out[:, :, piece.queries], lse[:, :, piece.queries], *part)
            return []

        def results(pair: Pair, piece: Piece) -> list[Tensor]:
            if pair.at == pair.q:
                return []
            num_q = _size(piece.queries)
            return [q.new_empty(*q.shape[:2], num_q, q.shape[3]), lse.new_empty(*lse.shape[:2], num_q)]

        def absorb(pair: Pair, piece: Piece, got: list[Tensor]) -> None:
            merge_into(out[:, :, piece.queries], lse[:, :, piece.queries], *got)

        self._walk(inputs, expect, compute, results, absorb)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dq, dk, dv)` in `wide` precision."""
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide(x), device=x.device) for x in (q, k, v))
        of_queries = (q, grad_out, lse, delta)

        def inputs(pair: Pair, piece: Piece) -> list[Tensor]:
            if pair.at == pair.q:
                return [_both(k, v, piece.keys)]
            return [x[:, :, piece.queries].contiguous() for x in of_queries]

        def expect(pair: Pair, piece: Piece) -> list[Tensor]:
            if pair.at == pair.q:
                return [k.new_empty(2, *k.shape[:2], _size(piece.keys), k.shape[3])]
            return [x.new_empty(*x.shape[:2], _size(piece.queries), *x.shape[3:]) for x in of_queries]

        def compute(pair: Pair, piece: Piece, got: list[Tensor]) -> list[Tensor]:
            rows = [x[:, :, piece.queries] for x in of_queries] if pair.at == pair.q else got
            k_, v_ = (k[:, :, piece.keys], v[:, :, piece.keys]) if pair.at == pair.kv else got[0]
            dq_, dk_, dv_ = self._differentiate(piece, *rows, k_, v_)
            if pair.at == pair.kv:
                dk[:, :, piece.keys] += dk_
                dv[:, :, piece.keys] += dv_
            if pair.at == pair.q:
                dq[:, :, piece.queries] += dq_
            if pair.q == pair.kv:
                return []
            home = torch.stack([dk_, dv_]) if pair.at == pair.q else dq_
            return [home.to(q.dtype).contiguous()]

        def results(pair: Pair, piece: Piece) -> list[Tensor]:
            if pair.at == pair.q:
                return [k.new_empty(2, *k.shape[:2], _size(piece.keys), k.shape[3])]
            return [q.new_empty(*q.shape[:2], _size(piece.queries), q.shape[3])]

        def absorb(pair: Pair, piece: Piece, got: list[Tensor]) -> None:
            if pair.at == pair.q:
                dk[:, :, piece.keys] += got[0][0]
                dv[:, :, piece.keys] += got[0][1]
            else:
                dq[:, :, piece.queries] += got[0]

        self._walk(inputs, expect, compute, results, absorb)
        return dq, dk, dv

    def _walk(
        self,
        inputs: Callable[[Pair, Piece], list[Tensor]],
        expect: Callable[[Pair, Piece], list[Tensor]],
        compute: Callable[[Pair, Piece, list[Tensor]], list[Tensor]],
        results: Callable[[Pair, Piece], list[Tensor]],
        absorb: Callable[[Pair, Piece, list[Tensor]], None],
    ) -> None:
        """Go through the steps; every rank posts its transfers in the same order.

        Args:
            inputs: what a pair's other rank sends; `expect`: buffers for it.
            compute: does a pair of this rank's and returns what goes back; `results`: buffers for it; `absorb`: takes it.
        """
        arrived = self._post(0, inputs, expect)
        home: Callable[[], None] = lambda: None
        for n, step in enumerate(self.steps):
            got = arrived()
            arrived = self._post(n + 1, inputs, expect)
            sends, receives, waiting = [], [], []
            for pair, piece in step.items():
                other = pair.kv if pair.at == pair.q else pair.q
                if pair.at == self.rank:
                    sends += [(x, other) for x in compute(pair, piece, got)]
                elif other == self.rank:
                    buffers = results(pair, piece)
                    receives += [(x, pair.at) for x in buffers]
                    waiting.append((pair, piece, buffers))
            home()  # the last step's results had this step's time to travel
            home = self._absorber(self.link.transfer(sends, receives), waiting, absorb)
        home()

    @staticmethod
    def _absorber(wait: Callable[[], None], waiting: list, absorb: Callable) -> Callable[[], None]:
        def take() -> None:
            wait()
            for pair, piece, buffers in waiting:
                if buffers:
                    absorb(pair, piece, buffers)

        return take

    def _post(self, n: int, inputs: Callable, expect: Callable) -> Callable[[], list[Tensor]]:
        """Start the transfers of step n's inputs; the result waits for them and returns this rank's."""
        if n >= len(self.steps):
            return lambda: []
        sends, receives, mine = [], [], []
        for pair, piece in self.steps[n].items():
            if pair.q == pair.kv:
                continue
            other = pair.kv if pair.at == pair.q else pair.q
            if pair.at == self.rank:
                mine = expect(pair, piece)
                receives += [(x, other) for x in mine]
            elif other == self.rank:
                sends += [(x, pair.at) for x in inputs(pair, piece)]
        wait = self.link.transfer(sends, receives)

        def arrived() -> list[Tensor]:
            wait()
            return mine

        return arrived

    def _attend(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = lse = None
        for rows in piece.calls:
            bounds = bounds_tensor(rows, 5, q.device)
            part = block_sparse(q, k, v, self.spec, bounds=bounds, **self.options)
            if out is None:
                out, lse = part[0].to(wide(q)), part[1]
            else:
                merge_into(out, lse, *part)
        return out, lse

    def _differentiate(
        self, piece: Piece, q: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor
    ) -> Sequence[Tensor]:
        parts = []
        for rows in piece.calls:
            bounds = bounds_tensor(rows, 5, q.device)
            parts.append(block_sparse_backward(grad_out, delta, q, k, v, lse, self.spec, bounds=bounds, **self.options))
        return [sum(x) for x in zip(*parts, strict=True)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
        out, lse = run.forward(q, k, v)
        out = out.to(q.dtype)
        ctx.run = run
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
        grads = ctx.run.backward(q, k, v, grad_out.to(q.dtype), lse, delta)
        return *(g.to(q.dtype) for g in grads), None


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


def _both(k: Tensor, v: Tensor, keys: slice) -> Tensor:
    return torch.stack([k[:, :, keys], v[:, :, keys]])


def _size(span: slice) -> int:
    return span.stop - span.start
