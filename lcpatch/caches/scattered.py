"""Attention over kept keys in plain torch, where no kernel of ours fits: a pattern over survivors, or keys with a bias.

A key counts by its position in the whole sequence, not by the slot that it lies in. Rows of queries are taken tile by
tile, so nothing of size T x S is held.

Shapes: B batch, K KV heads, G query heads a KV head, t queries of a tile, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import DENSE, BlockSparseSpec
from lcpatch_kernels.block_sparse.reference import allowed

TILE = 128  # queries: 32 heads over 32K slots make 512 MiB of scores


class Keys(NamedTuple):
    """What is attended to.

    Args:
        keys, values: [B, K, S, D]; `values` may be None where only scores are wanted.
        positions: integer [B, K, S], counted from the row's first real token; negative: no key.
        bias: fp32 [B, K, S] added to a key's scores, or None.
    """

    keys: Tensor
    values: Tensor | None
    positions: Tensor
    bias: Tensor | None = None


class Queries(NamedTuple):
    """Who attends, and how.

    Args:
        query: [B, H, T, D].
        positions: integer [B, T], counted from the row's first real token; negative: a pad, which sees nothing.
        spec: the rule of each query head.
        scale, softcap: as in `block_sparse`.
        length: tokens of the longest row, which a rule may ask for.
    """

    query: Tensor
    positions: Tensor
    spec: BlockSparseSpec
    scale: float | None
    softcap: float | None
    length: int


def is_dense(spec: BlockSparseSpec) -> bool:
    """Whether every head sees all that came before."""
    return all(rule == DENSE for rule in spec.rules)


def attend(queries: Queries, kept: Keys) -> tuple[Tensor, Tensor]:
    """`(out [B, H, T, D], lse [B, H, T])`; queries that see nothing get 0 and -inf."""
    query, values = queries.query, kept.values
    out, lse = torch.zeros_like(query), _like_lse(query)
    for rows, scores in _tiles(queries, kept):
        top = scores.logsumexp(-1)
        p = (scores - top.masked_fill(top.isinf(), 0)[..., None]).exp()
        lse[:, :, rows] = top.flatten(1, 2)
        out[:, :, rows] = (p @ values.to(p.dtype)[:, :, None]).flatten(1, 2).to(out.dtype)
    return out, lse


def mass(queries: Queries, kept: Keys, lse: Tensor) -> Tensor:
    """What each query head of the group gave each key in all, given its `lse` [B, H, T]: [B, K, G, S]."""
    total: Tensor | float = 0.0
    for rows, scores in _tiles(queries, kept):
        base = lse[:, :, rows].unflatten(1, (scores.shape[1], -1)).to(scores.dtype)
        total = total + (scores - base.masked_fill(base.isinf(), torch.inf)[..., None]).exp().sum(-2)
    return total


def _tiles(queries: Queries, kept: Keys) -> Iterator[tuple[slice, Tensor]]:
    """Masked scores [B, K, G, t, S] of each tile of queries."""
    query, kv_heads = queries.query, kept.keys.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if queries.scale is None else queries.scale
    spec, keys = queries.spec, kept.keys.to(dtype)[:, :, None].mT
    which = torch.tensor(spec.head_rules, device=query.device).view(kv_heads, -1)
    for start in range(0, query.shape[2], TILE):
        rows = slice(start, min(start + TILE, query.shape[2]))
        scores = query[:, :, rows].unflatten(1, (kv_heads, -1)).to(dtype) @ keys * scale
        if queries.softcap:
            scores = queries.softcap * (scores / queries.softcap).tanh()
        if kept.bias is not None:
            scores = scores + kept.bias.to(dtype)[:, :, None, None]
        i, j = queries.positions[:, None, rows, None], kept.positions[:, :, None]
        real = (i >= 0) & (j >= 0)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for index, rule in enumerate(spec.rules):
            sees = allowed(rule, spec.block_size, i, j, queries.length) & real  # [B, K, t, S]
            keep |= sees[:, :, None] & (which == index)[None, :, :, None, None]
        yield rows, scores.masked_fill(~keep, -torch.inf)


def _like_lse(query: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
