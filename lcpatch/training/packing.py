"""Packed documents in a chunk: masks that let no token see another document, in the form a model's attention wants.

transformers makes such masks only for a forward without a cache; a chunk has one. All forms have four dimensions, which
transformers passes on untouched.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedModelError
from ..hf import NAME
from ..hf.bounds import compact
from ..hf.models import uncompiled
from ..hf.state import dense_name

PAD = -1
WINDOWED = ("create_sliding_window_causal_mask", "create_masks_for_generate")
MAKERS = ("create_causal_mask", *WINDOWED)
"""transformers' functions that make masks or pass on finished ones; WINDOWED are those that know of a window."""


def documents(position_ids: Tensor | None, attention_mask: Tensor | None, batch: int) -> Tensor | None:
    """Which document each token belongs to, [B, T], pads -1; None where no row has more than one.

    Args:
        position_ids: [1 or B, T]. A document starts where they do not rise by one, which is transformers' rule; beside
            a mask, where they do not rise.
        attention_mask: [B, T], 1 = token and 0 = pad; positions of pads count for nothing.
        batch: number of rows.
    """
    if position_ids is None:
        return None
    positions = position_ids.expand(batch, -1)
    starts = torch.zeros_like(positions, dtype=torch.bool)
    step = positions[:, 1:] - positions[:, :-1]
    if attention_mask is None:
        starts[:, 1:] = step != 1
    else:
        real = attention_mask.bool()
        starts[:, 1:] = (step <= 0) & real[:, 1:] & real[:, :-1]
    if not bool(starts.any()):
        return None
    numbers = starts.long().cumsum(-1)
    return numbers if attention_mask is None else numbers.masked_fill(~real, PAD)


def why_no_packing(decoder: Any) -> str | None:
    """Why a decoder cannot be told of packed documents in a chunk; None: it can."""
    if not _has(decoder, *MAKERS):
        return "makes its masks by itself, and takes none that keeps packed documents apart"
    if _has(decoder, "build_alibi_tensor") and getattr(decoder.config, "alibi", True):
        return "counts distances (ALiBi) by a mask of the whole row, which says nothing of packed documents"
    return None


def _has(decoder: Any, *names: str) -> bool:
    """Whether the decoder's module has one of these functions: what it makes masks with, no config says."""
    modules = [sys.modules.get(kind.__module__) for kind in type(uncompiled(decoder)).__mro__]
    return any(hasattr(module, name) for module in modules for name in names)


def chunk_mask(decoder: Any, numbers: Tensor, start: int, end: int, dtype: torch.dtype) -> Any:
    """The attention mask of tokens [start, end), which see [0, end) of their own documents.

    Args:
        decoder: the model without its head; `why_no_packing` has nothing against it.
        numbers: of each token's document, [B, T], from `documents`.
        start, end: the chunk.
        dtype: of the hidden states, for masks that are added to scores.

    Returns:
        One mask, or one for each kind of layer by its name.

    Raises:
        UnsupportedModelError: an attention implementation that takes no such mask, or layers of an unknown kind.
    """
    config = decoder.config
    implementation = config._attn_implementation
    patched = implementation == NAME
    dense = dense_name(config) if patched else implementation
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not _has(decoder, *WINDOWED):  # Moshi's config has one that its attention does not know
        window = None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])

    def of(kind: str) -> Tensor:
        if patched and kind == "full_attention":
            return compact(_bounds(numbers, start, end), start)
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"packed documents in chunks: layers of kind {kind!r} are not supported")
        return _dense(numbers, start, end, window if kind == "sliding_attention" else None, dense, dtype)

    masks = {kind: of(kind) for kind in sorted(kinds)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _bounds(numbers: Tensor, start: int, end: int) -> Tensor:
    """int32 [B, N, 4] of `lcpatch_kernels.block_sparse`: the documents that have tokens in [start, end)."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for row in numbers[:, :end].tolist():
        rows.append([])
        begin = 0
        for at in range(1, end + 1):
            if at == end or row[at] != row[begin]:
                if row[begin] != PAD and at > start:
                    rows[-1].append((max(begin - start, 0), at - start, begin, at))
                begin = at
    most = max(1, *map(len, rows)) if rows else 1
    filled = [row + [(0, 0, 0, 0)] * (most - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int32, device=numbers.device)


def _dense(numbers: Tensor, start: int, end: int, window: int | None, form: str, dtype: torch.dtype) -> Tensor:
    """[B, 1, C, end]: bool for "sdpa", additive for "eager"."""
    if form not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attn_implementation={form!r} takes no mask of packed documents in a chunk; use 'sdpa', 'eager', "
            "lcpatch.apply, or one document per row"
        )
    q = torch.arange(start, end, device=numbers.device)[:, None]
    k = torch.arange(end, device=numbers.device)[None]
    keep = (k <= q) & (True if window is None else q - k < window)
    keep = (keep & (numbers[:, start:end, None] == numbers[:, None, :end]))[:, None]
    if form == "sdpa":
        return keep
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, torch.finfo(dtype).min)
