"""The same attention through a dense mask: an oracle for small sizes that shares no index arithmetic with the others.

Every pair (i, j) is asked the rule's question separately, which costs O(T S) memory, and torch's autograd
differentiates what follows. `flex` hands the same question to FlexAttention as a `mask_mod`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .spec import BlockSparseSpec

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128  # FlexAttention's default


def mask_mod(
    spec: BlockSparseSpec, bounds: Tensor | None, num_queries: int, num_keys: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern as a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`, padding and packed segments included."""
    if bounds is None:
        bounds = torch.tensor([[[0, num_queries, 0, num_keys]]], device=device)
    q_seg, q_pos = _positions(bounds, num_queries, queries=True)
    k_seg, k_pos = _positions(bounds, num_keys, queries=False)
    length = _lengths(bounds)  # [B, N]
    rules = _rule_table(spec, str(device)).unbind()  # one by one: FlexAttention's tracer takes [:, h] for a read-back
    rows = bounds.shape[0]

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        b = b % rows  # bounds may have one row for the whole batch
        sinks, stride, residue, num, den, shifted, back, cyclic = (table[h] for table in rules)
        seg, i, j = q_seg[b, q_idx], q_pos[b, q_idx], k_pos[b, kv_idx]
        n = length[b, seg.clamp(min=0)]
        share = den > 0
        group = torch.where(share, (n * num + den - 1) // den.clamp(min=1), num).clamp(min=1)
        shift = (shifted > 0) & ~(share & (group >= n))
        offset = torch.where(shift, group - group // 2, 0)
        lo = (i + offset) // group * group - offset - back
        striped = (stride > 0) & (j // spec.block_size % stride.clamp(min=1) == residue)
        causal = (j <= i) & ((j >= lo) | (j < sinks) | striped)
        turn = torch.where(shift, group // 2, 0)
        r_i, r_j = (i - turn) % n.clamp(min=1), (j - turn) % n.clamp(min=1)
        rolled = (r_i // group == r_j // group) & (r_j <= r_i)
        return (seg >= 0) & (seg == k_seg[b, kv_idx]) & torch.where(cyclic > 0, rolled, causal)

    return keep


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: BlockSparseSpec, bounds: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.forward`, differentiable by autograd; O(B H T S) memory."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in (q.shape[0], q.shape[1], q.shape[2], k.shape[2])), indexing="ij"
    )
    keep = mask_mod(spec, bounds, q.shape[2], k.shape[2], q.device)(b, h, i, j)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # [B, K, H // K, T, D]: K and V are not repeated
    scores = grouped @ k.to(dtype)[:, :, None].mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.flatten(1, 2).masked_fill(~keep, -torch.inf)
    # Rows that see nothing get lse = -inf and out = 0. Both need a finite stand-in first: -inf - -inf is NaN,
    # and autograd would multiply that NaN by zero.
    empty = ~keep.any(-1)
    lse = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    out = (p.unflatten(1, (k.shape[1], -1)) @ v.to(dtype)[:, :, None]).flatten(1, 2)
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf)


def flex(
    q: Tensor, k: Tensor, v: Tensor, spec: BlockSparseSpec, bounds: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` through FlexAttention, compiled on a GPU, eager (dense scores) on a CPU."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    sizes = q.shape[2], k.shape[2], q.device
    mask = _whole_block_mask(spec, *sizes) if bounds is None else block_mask(spec, bounds, *sizes)

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    run = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    out, aux = run(
        q,
        k,
        v,
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


def block_mask(
    spec: BlockSparseSpec, bounds: Tensor | None, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask:
    """FlexAttention's tables of the pattern: what `create_block_mask` returns, asked a row of tiles at a time.

    That function holds the answers to all H T S questions and what leads to them, 72 GiB at 9 heads and 32K tokens;
    here it is 0.1 GiB, for each head of one rule answers for all of them. The tables hold H (T / 128)^2 integers each:
    134 MB at 128K and 32 heads.
    """
    keep = mask_mod(spec, bounds, num_queries, num_keys, device)
    rules = list(dict.fromkeys(spec.head_rules))
    asked = torch.tensor([spec.head_rules.index(rule) for rule in rules], device=device)[:, None, None]
    row = torch.arange(1 if bounds is None else bounds.shape[0], device=device)[:, None, None, None]
    keys = torch.arange(num_keys, device=device)
    some, every = [], []  # of whose pairs in a tile is any kept, are all
    for queries in torch.arange(num_queries, device=device).split(TILE):
        kept = keep(row, asked, queries[:, None], keys)
        kept = pad(kept, (0, -num_keys % TILE, 0, TILE - len(queries)))
        kept = kept.unflatten(3, (-1, TILE))  # [B, R, 128, S / 128, 128]
        some.append(kept.any(4).any(2))
        every.append(kept.all(4).all(2))
    of_head = torch.tensor([rules.index(rule) for rule in spec.head_rules], device=device)
    tiles = (torch.stack(x, 2)[:, of_head] for x in (some, every))
    return from_tiles(*tiles, keep, (num_queries, num_keys))


def from_tiles(some: Tensor, every: Tensor, keep: Callable[..., Tensor], sizes: tuple[int, int]) -> BlockMask:
    """FlexAttention's tables from whether any pair of a tile of 128 x 128 is kept, and whether all are.

    Args:
        some, every: bool [B, H, T / 128, S / 128].
        keep: the `mask_mod` that both follow from, asked again where only some are.
        sizes: T and S.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        indices = tiles.int().argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32), indices.int()

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every), *ordered(every), BLOCK_SIZE=TILE, mask_mod=keep, seq_lengths=sizes
    )


@lru_cache(maxsize=4)
def _whole_block_mask(spec: BlockSparseSpec, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """Of texts without padding: the layers of a model ask for the same, and so does every step of training."""
    return block_mask(spec, None, num_queries, num_keys, device)


def _positions(bounds: Tensor, num_tokens: int, *, queries: bool) -> tuple[Tensor, Tensor]:
    """For every token its segment (-1: none) and its position from the segment's first key, both [B, tokens]."""
    q0, q1, k0, k1 = (x[..., None].long() for x in bounds[..., :4].unbind(-1))  # [B, N, 1]
    start, end = (q0, q1) if queries else (k0, k1)
    token = torch.arange(num_tokens, device=bounds.device)
    inside = (token >= start) & (token < end)  # [B, N, tokens]
    segment = torch.where(inside.any(1), inside.int().argmax(1), -1)
    # The token index at which position 0 lies: queries align at the end.
    zero = q1 - _lengths(bounds)[..., None] if queries else k0
    start_of = zero[..., 0].gather(1, segment.clamp(min=0))
    return segment, token - start_of


def _lengths(bounds: Tensor) -> Tensor:
    """Positions of each segment [B, N]: its keys, and the gap after them."""
    keys = bounds[..., 3] - bounds[..., 2]
    return (keys + bounds[..., 4] if bounds.shape[-1] == 5 else keys).long()


@lru_cache(maxsize=64)
def _rule_table(spec: BlockSparseSpec, device: str) -> Tensor:
    """[8, H]: the fields of each query head's rule, in `to_ints` order."""
    flat = spec.to_ints()
    fields = torch.tensor(flat[2 : 2 + 8 * len(spec.rules)]).view(-1, 8)
    return fields[list(spec.head_rules)].T.contiguous().to(device)
