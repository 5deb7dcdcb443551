"""Bounds and scores of pages in plain torch. The definition for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def bounds_of(k: Tensor, page_size: int, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(low, high, mean)` [B, K, P, D]; pages without tokens are inf, -inf and 0."""
    size = k.shape[2]
    token = torch.arange(size, device=k.device)
    real = torch.ones(k.shape[0], size, dtype=torch.bool, device=k.device)
    if bounds is not None:
        real = (token >= bounds[:, :1]) & (token < bounds[:, 1:])
    rest = -size % page_size
    k = pad(k, (0, 0, 0, rest)).unflatten(2, (-1, page_size))
    real = pad(real, (0, rest)).unflatten(1, (-1, page_size))
    out = ~real[:, None, ..., None]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    total = k.masked_fill(out, 0).sum(3, dtype=dtype)
    mean = total / real.sum(-1).clamp(min=1)[:, None, :, None]
    return k.masked_fill(out, torch.inf).amin(3), k.masked_fill(out, -torch.inf).amax(3), mean.to(k.dtype)


def scores(q: Tensor, low: Tensor, high: Tensor | None, lower: bool) -> Tensor:
    """[B, H, P]: q low, or the bound that `lower` says; -inf for a page without tokens."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q[:, :, 0].to(dtype).unflatten(1, (low.shape[1], -1))  # [B, K, H // K, D]
    low = low.to(dtype)
    if high is None:
        return (q @ low.mT).flatten(1, 2)
    high = high.to(dtype)
    empty = (low > high).any(-1)
    low, high = (x.masked_fill(empty[..., None], 0) for x in ((high, low) if lower else (low, high)))
    both = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT
    return both.masked_fill(empty[:, :, None], -torch.inf).flatten(1, 2)
