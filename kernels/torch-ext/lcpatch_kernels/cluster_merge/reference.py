"""One pass of soft matching and merging in plain torch. The definition for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def match(k: Tensor, size: Tensor, chunk: int, merges: int) -> Tensor:
    """`target` int32 [B, K, S]: the output slot of every slot, -1 for a pad that goes."""
    whole = k.shape[2] // chunk * chunk
    parts = []
    if whole:
        body = _match(k[:, :, :whole].unflatten(2, (-1, chunk)), size[:, :, :whole].unflatten(2, (-1, chunk)), merges)
        first = torch.arange(whole // chunk, device=k.device)[:, None] * (chunk - merges)
        parts.append(torch.where(body >= 0, body + first, -1).flatten(2))
    if rest := k.shape[2] - whole:
        tail = _match(k[:, :, None, whole:], size[:, :, None, whole:], rest * merges // chunk)[:, :, 0]
        parts.append(torch.where(tail >= 0, tail + whole // chunk * (chunk - merges), -1))
    return torch.cat(parts, 2).int() if parts else size.int()


def _match(k: Tensor, size: Tensor, merges: int) -> Tensor:
    """The same within each chunk: k [B, K, chunks, c, D] -> int64 [B, K, chunks, c]."""
    real = size > 0
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    unit = torch.nn.functional.normalize(k.to(dtype).masked_fill(~real[..., None], 0), dim=-1)
    a, b = unit[..., 0::2, :], unit[..., 1::2, :]
    gone = ~real & ((~real).cumsum(-1) <= merges)  # pads first, the first ones before others
    edges = merges - gone.sum(-1, keepdim=True)
    joins = torch.zeros_like(real)
    partner = torch.zeros_like(real[..., 0::2], dtype=torch.int64)
    if b.shape[-2]:
        cosine = (a @ b.mT).masked_fill(~(real[..., 0::2, None] & real[..., None, 1::2]), -torch.inf)
        best, partner = cosine.max(-1)
        rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        joins[..., 0::2] = rank < edges
    stays = ~(gone | joins)
    place = stays.cumsum(-1) - 1
    target = torch.where(stays, place, -1)
    joined = place.gather(-1, (2 * partner + 1).clamp(max=k.shape[-2] - 1))
    target[..., 0::2] = torch.where(joins[..., 0::2], joined, target[..., 0::2])
    return target


def merge(
    k: Tensor, v: Tensor, size: Tensor, target: Tensor, num_out: int, chunk: int, merges: int, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(k, v, size)` of `num_out` slots: the means of what `target` sends to each; pads count for nothing, alone they
    are 0. `chunk` and `merges` say nothing new here (the kernel finds a chunk's output by them)."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    real = size > 0
    weight = size.to(dtype) if weighted else real.to(dtype)
    slot = torch.where(target >= 0, target, num_out).long()  # one slot more for what is gone, cut off below

    def gather(x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], num_out + 1, *x.shape[3:])
        index = slot if x.dim() == 3 else slot[..., None].expand_as(x)
        return out.scatter_add_(2, index, x)[:, :, :num_out].contiguous()

    total = gather(weight)[..., None]
    means = (
        gather(x.to(dtype).masked_fill(~real[..., None], 0) * weight[..., None]) / total.masked_fill(total == 0, 1)
        for x in (k, v)
    )
    k_out, v_out = (x.to(k.dtype) for x in means)
    return k_out, v_out, gather(size)
