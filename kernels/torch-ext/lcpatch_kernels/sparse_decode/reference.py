"""One decode step in plain torch: every row gathers the keys that it attends to. The definition for the kernel.

scores = softcap(scale * q k^T) + bias      over the row's keys, k times its scale if it is quantised
lse    = logsumexp(scores)
out    = softmax(scores) v
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..block_sparse.reference import keys_of
from ..block_sparse.spec import BlockSparseSpec


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSparseSpec | None,
    bounds: Tensor | None,
    slots: Tensor | None,
    num_keys: Tensor | None,
    page_size: int,
    bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    softcap: float,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out [B, H, 1, D], lse [B, H, 1], scores [B, H, S] or None)`; rows without keys are 0 and -inf."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(q.shape[0], 1, q.shape[1], q.shape[3]).transpose(1, 2)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    every = lse.expand(-1, -1, k.shape[2]).clone() if return_scores else None
    if spec is not None:
        rows = _by_rule(k, spec, bounds)
    else:
        rows = _by_slot(q.shape[1] // k.shape[1], slots, num_keys, page_size)
    for row, heads, kv_head, keys in rows:
        if not len(keys):
            continue
        k_t, v_t = k[row, kv_head, keys].to(dtype), v[row, kv_head, keys].to(dtype)
        if k_scale is not None:
            k_t, v_t = (
                k_t * k_scale[row, kv_head, keys, None].to(dtype),
                v_t * v_scale[row, kv_head, keys, None].to(dtype),
            )
        scores = q[row, heads, 0].to(dtype) @ k_t.T * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias[row, kv_head, keys].to(dtype)
        if every is not None:
            every[row, heads, keys] = scores
        lse[row, heads, 0] = scores.logsumexp(-1)
        out[row, heads, 0] = (scores.softmax(-1) @ v_t).to(q.dtype)
    return out, lse, every


def _by_rule(k: Tensor, spec: BlockSparseSpec, bounds: Tensor | None) -> Iterator[tuple[int, slice, int, Tensor]]:
    """(batch row, query heads, KV head, keys): the keys of the last position of each row under its head's rule."""
    rows = [(0, k.shape[2])] * k.shape[0] if bounds is None else bounds.tolist()
    for row, (k0, k1) in enumerate(rows):
        for pack in spec.packs(k.shape[1]):
            length = k1 - k0
            keys = torch.arange(0, device=k.device)
            if length > 0:
                keys = keys_of(spec.rules[pack.rule], spec.block_size, length - 1, length, length, k.device) + k0
            yield row, slice(pack.first_head, pack.first_head + pack.num_heads), pack.kv_head, keys


def _by_slot(
    group: int, slots: Tensor, num_keys: Tensor | None, page_size: int
) -> Iterator[tuple[int, slice, int, Tensor]]:
    """The same from explicit lists; a negative page is left out."""
    within = torch.arange(page_size, device=slots.device)
    for row in range(slots.shape[0]):
        for kv_head in range(slots.shape[1]):
            pages = slots[row, kv_head].long()
            keys = (pages[:, None] * page_size + within).flatten()
            if num_keys is not None:
                keys = keys[: int(num_keys[row, kv_head])]
            yield row, slice(kv_head * group, (kv_head + 1) * group), kv_head, keys[keys >= 0]
