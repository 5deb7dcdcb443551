"""Column sums of attention in plain torch, tile by tile: the definition for the kernel.

    score(i, j) = softcap(scale * q_i k_j)                  for keys j up to query i's own position
    c(h, j)     = sum over queries i of exp(score(i, j) - lse_i)
    mass(j)     = sum, mean or max over the query heads h of a KV head of c(h, j)

Tiles of queries against all of the keys that they see; inputs below fp32 are computed in fp32, float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_sparse.reference import segments

TILE = 128  # query rows a tile, as in block_sparse's reference


def forward(
    q: Tensor, k: Tensor, lse: Tensor, bounds: Tensor | None, scale: float, softcap: float, reduce: str
) -> Tensor:
    """[B, K, S] in fp32, or float64 for float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, kv_heads, num_keys = k.shape[:3]
    sums = torch.zeros(batch, kv_heads, q.shape[1] // kv_heads, num_keys, dtype=dtype, device=q.device)
    for seg in segments(bounds, batch, q.shape[2], num_keys):
        for start in range(seg.q0, seg.q1, TILE):
            stop = min(start + TILE, seg.q1)
            last = seg.first + stop - seg.q0  # keys that the tile's last query sees
            keys = slice(seg.k0, seg.k0 + last)
            q_t = q[seg.row, :, start:stop].unflatten(0, (kv_heads, -1)).to(dtype)  # [K, G, m, D]
            lse_t = lse[seg.row, :, start:stop].unflatten(0, (kv_heads, -1)).to(dtype)
            scores = q_t @ k[seg.row, :, keys].to(dtype)[:, None].mT * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            i = torch.arange(seg.first + start - seg.q0, last, device=q.device)
            seen = torch.arange(last, device=q.device) <= i[:, None]
            p = (scores - lse_t[..., None]).exp().masked_fill(~(seen & lse_t[..., None].isfinite()), 0)
            sums[seg.row, :, :, keys] += p.sum(-2)
    return {"sum": sums.sum, "mean": sums.mean, "max": sums.amax}[reduce](2)
