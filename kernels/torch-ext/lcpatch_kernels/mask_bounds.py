"""Where each row's real tokens lie, read off a dense attention mask: the `bounds` that `block_sparse` takes.

The masks that transformers builds for full attention say three things: causality, padding at either end, and packed
documents. Anything else in a mask is refused, never dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> (version, bounds): the layers of a forward look once


def bounds_of(mask: Tensor) -> Tensor:
    """Bounds int32 [B, N, 4] of a mask [B, 1, T, S]: bool (true: attend), or floating point (0: attend).

    Raises:
        ValueError: a mask that is not causal attention within padded or packed rows.
    """
    version, bounds = _known.get(mask, (None, None))
    if bounds is None or version != mask._version:
        bounds = _bounds(_visible(mask))
        _known[mask] = (mask._version, bounds)
    return bounds


def _visible(mask: Tensor) -> Tensor:
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"an attention mask of shape {list(mask.shape)} is not [batch, 1, queries, keys]")
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0]


def _bounds(visible: Tensor) -> Tensor:
    """From bool [B, T, S]. A query is real if the last key it sees is itself; runs of real queries that begin with the
    same key are the segments."""
    _, num_queries, num_keys = visible.shape
    query = torch.arange(num_queries, device=visible.device)
    key = torch.arange(num_keys, device=visible.device)
    seen = visible.any(-1)
    first = visible.int().argmax(-1)
    last = torch.where(seen, num_keys - 1 - visible.flip(-1).int().argmax(-1), -1)
    before = max(int((last - query).max()), 0)  # keys that precede the first query
    own = before + query
    real = seen & (last == own)
    starts = real.clone()
    starts[:, 1:] &= ~real[:, :-1] | (first[:, 1:] != first[:, :-1])
    segment = starts.cumsum(-1) - 1
    most = max(int(starts.sum(-1).max()), 1)
    slot = torch.where(real, segment, most)  # what is no token goes to a slot that is cut off
    tokens = query.expand_as(slot)
    q0 = torch.full_like(slot, num_queries)[:, :1].repeat(1, most + 1).scatter_reduce(1, slot, tokens, "amin")
    q1 = torch.zeros_like(q0).scatter_reduce(1, slot, tokens + 1, "amax")
    k0 = torch.zeros_like(q0).scatter(1, slot, first)
    bounds = torch.stack([q0, q1, k0, before + q1], -1)[:, :most]
    bounds = torch.where((q1 > 0)[:, :most, None], bounds, 0)
    rule = (key >= first[..., None]) & (key <= own[:, None])
    exact = bool(((visible == rule) | ~real[..., None]).all())
    pads = (~real)[..., None] & (key == own[:, None])  # a query that is no token must be no key either
    apart = bounds[:, 1:, 2] >= bounds[:, :-1, 3]  # each document begins after the one before
    told = exact and bool((apart | (bounds[:, 1:, 1] == 0)).all())
    if not told or before + num_queries > num_keys or bool((visible & pads.any(1, keepdim=True)).any()):
        raise ValueError(
            "this attention mask says more than causality, padding and packing, which no pattern's kernel can follow; "
            "pass a 2-D attention_mask [batch, tokens], or load the model with attn_implementation='sdpa'"
        )
    return bounds.int()
