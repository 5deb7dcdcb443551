"""Block-sparse attention in plain torch, tile by tile: the definition that the kernels are judged by.

    scores = softcap(scale * q k^T)  over the keys that a row's `Rule` allows, each with its bias added, if there is one
    lse    = logsumexp(scores)       natural logarithm
    out    = softmax(scores) v

Each tile of query rows gathers exactly the keys that some row of it may see (spec.py says which), so memory is
O(tile * keys per row) and time follows the pattern's density: 32K tokens on a CPU never see a T x T matrix. Inputs
below fp32 are computed in fp32, float64 stays float64.

Backward recomputes the scores from the LSE, as in FlashAttention-2 (arXiv 2307.08691, algorithm 2); the gradient of the
LSE itself enters as  delta - dlse.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head dim; m rows and n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import BlockSparseSpec, Pack, Rule

TILE = 128  # query rows a tile: below, Python's overhead shows; above, tiles gather keys that few of their rows see


class Segment(NamedTuple):
    """A run of real tokens of one batch row: queries [q0, q1) end `gap` positions after keys [k0, k1)."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    gap: int = 0

    @property
    def length(self) -> int:
        """Positions, of which the last `gap` have no key."""
        return self.k1 - self.k0 + self.gap

    @property
    def first(self) -> int:
        """Position of query q0, counted from key k0."""
        return self.length - (self.q1 - self.q0)


class Tile(NamedTuple):
    """Query rows `rows` of `heads` in batch row `row`, the keys they touch, and which of them each may see."""

    row: int
    heads: slice
    kv_head: int
    rows: slice
    keys: slice | Tensor  # along S: a slice where they are contiguous, [n] otherwise
    allowed: Tensor  # [m, n]


def segments(bounds: Tensor | None, batch: int, num_queries: int, num_keys: int) -> list[Segment]:
    """The segments of `bounds` [B, N, 4 or 5] that hold queries; without bounds one per batch row."""
    if bounds is None:
        return [Segment(b, 0, num_queries, 0, num_keys) for b in range(batch)]
    rows = bounds.tolist()
    return [Segment(b, *seg) for b, row in enumerate(rows) for seg in row if seg[1] > seg[0]]


def keys_of(rule: Rule, block_size: int, p0: int, p1: int, length: int, device: torch.device) -> Tensor:
    """Positions, ascending, of every key that some row in [p0, p1) may see."""
    start = rule.lo(p0, length)
    sinks = min(rule.sinks, start)
    far = torch.arange(sinks, device=device)
    if rule.stride:
        first = rule.residue * block_size
        blocks = torch.arange(first, max(first, start), rule.stride * block_size, device=device)
        stripe = (blocks[:, None] + torch.arange(block_size, device=device)).flatten()
        far = torch.cat([far, stripe[(stripe >= sinks) & (stripe < start)]])
    return torch.cat([far, torch.arange(start, p1, device=device)])


def allowed(rule: Rule, block_size: int, i: Tensor, j: Tensor, length: int) -> Tensor:
    """Whether the row at position `i` may see the key at position `j`; broadcasts."""
    group, offset = rule.resolve(length)
    keep = j >= (i + offset) // group * group - offset - rule.back
    keep = keep | (j < rule.sinks)
    if rule.stride:
        keep = keep | (j // block_size % rule.stride == rule.residue)
    return keep & (j <= i)


def tiles(q: Tensor, k: Tensor, spec: BlockSparseSpec, bounds: Tensor | None) -> Iterator[Tile]:
    """Every tile of work, each real query row of each head in exactly one."""
    if spec.is_cyclic:
        raise ValueError("cyclic rules are not intervals: use impl='sdpa' or impl='flex'")
    packs = spec.packs(k.shape[1])
    for seg in segments(bounds, q.shape[0], q.shape[2], k.shape[2]):
        for p0 in range(seg.first // TILE * TILE, seg.length, TILE):  # tiles sit on the position grid, like the blocks
            p0, p1 = max(p0, seg.first), min(p0 + TILE, seg.length)
            rows = slice(seg.q0 + p0 - seg.first, seg.q0 + p1 - seg.first)
            by_rule = {}
            for pack in packs:
                if pack.rule not in by_rule:
                    by_rule[pack.rule] = _keys_and_mask(spec, pack, seg, p0, p1, q.device)
                if not by_rule[pack.rule][1].shape[1]:
                    continue  # every key lies before a gap that these rows do not look across
                heads = slice(pack.first_head, pack.first_head + pack.num_heads)
                yield Tile(seg.row, heads, pack.kv_head, rows, *by_rule[pack.rule])


def _keys_and_mask(
    spec: BlockSparseSpec, pack: Pack, seg: Segment, p0: int, p1: int, device: torch.device
) -> tuple[slice | Tensor, Tensor]:
    rule = spec.rules[pack.rule]
    j = keys_of(rule, spec.block_size, p0, p1, seg.length, device)
    if seg.gap:
        j = j[j < seg.k1 - seg.k0]
    i = torch.arange(p0, p1, device=device)
    mask = allowed(rule, spec.block_size, i[:, None], j, seg.length)
    ends = (int(j[0]), int(j[-1]) + 1) if len(j) else (0, 0)
    contiguous = ends[1] - ends[0] == len(j)  # they ascend
    return (slice(seg.k0 + ends[0], seg.k0 + ends[1]) if contiguous else j + seg.k0), mask


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out [B, H, T, D], lse [B, H, T])`; rows that see nothing are 0 and -inf."""
    dtype = _math_dtype(q)
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # Hugging Face wants [B, T, H, D]
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for t in tiles(q, k, spec, bounds):
        q_t = q[t.row, t.heads, t.rows].to(dtype)
        k_t, v_t = (x[t.row, t.kv_head, t.keys].to(dtype) for x in (k, v))
        scores, _ = _scores(q_t, k_t, t.allowed, scale, softcap)
        if bias is not None:
            scores = scores + bias[t.row, t.kv_head, t.keys].to(dtype)
        lse_t = scores.logsumexp(-1)
        lse[t.row, t.heads, t.rows] = lse_t
        out[t.row, t.heads, t.rows] = (_probabilities(scores, lse_t) @ v_t).to(q.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` in the inputs' dtypes, summed in `_math_dtype`."""
    dtype = _math_dtype(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    for t in tiles(q, k, spec, bounds):
        q_t, do_t = (x[t.row, t.heads, t.rows].to(dtype) for x in (q, grad_out))
        k_t, v_t = (x[t.row, t.kv_head, t.keys].to(dtype) for x in (k, v))
        scores, slope = _scores(q_t, k_t, t.allowed, scale, softcap)
        p = _probabilities(scores, lse[t.row, t.heads, t.rows])
        ds = p * (do_t @ v_t.mT - delta[t.row, t.heads, t.rows, None]) * slope
        dq[t.row, t.heads, t.rows] = ds @ k_t
        # One KV head serves all of the pack's query heads: fold them into the rows, so that one product sums them.
        dk_t, dv_t = ds.flatten(0, 1).mT @ q_t.flatten(0, 1), p.flatten(0, 1).mT @ do_t.flatten(0, 1)
        dk[t.row, t.kv_head, t.keys] += dk_t  # keys are distinct within a tile, so += loses nothing
        dv[t.row, t.kv_head, t.keys] += dv_t
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, keep: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Masked scores of a tile and their slope with respect to q k^T."""
    scores = q @ k.mT * scale
    slope: Tensor | float = scale
    if softcap:
        tanh = (scores / softcap).tanh()
        scores, slope = softcap * tanh, scale * (1 - tanh * tanh)
    return scores.masked_fill(~keep, -torch.inf), slope


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row that sees nothing has lse = -inf, and -inf - -inf is NaN.
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
