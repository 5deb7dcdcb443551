"""The attention function that transformers takes from a kernel on the Hub: `attn_implementation="org/lcpatch-kernels"`.

It knows no patterns. What each layer attends to stands in the model's config, `config.lcpatch["specs"]`, as the
integers of a `BlockSparseSpec`; a model without them gets plain causal attention, and that is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .block_sparse import DENSE, BlockSparseSpec, Rule, block_sparse
from .mask_bounds import bounds_of

supports_flash_attn = True
"""Tells transformers that `flash_attn_forward` is there, and takes the masks of "sdpa"."""

MAX_INTEGERS = 1 << 16
"""Of one layer's spec: 1024 heads, each with a rule of its own, take 9 times 1024."""


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in the signature of transformers' `AttentionInterface`.

    Args:
        module: the attention layer; its `config.lcpatch` says which keys a row may see.
        query: [B, H, T, D], rotated.
        key, value: [B, K, S, D], rotated, with the cache's part in front, not repeated for GQA.
        attention_mask: None, or [B, 1, T, S], as transformers builds it for "sdpa".
        dropout, scaling, sliding_window, softcap, s_aux: as transformers passes them; `s_aux` are sink logits [H].

    Returns:
        `(out [B, T, H, D], None)`.

    Raises:
        ValueError: dropout, a mask that a pattern cannot be combined with, a broken or unsupported `config.lcpatch`.
    """
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set attention_dropout to 0 in the config")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; these kernels are for causal self-attention")
    spec = _spec(module, query.shape[1])
    if spec is None and sliding_window is not None and attention_mask is not None:
        out = _masked(query, key, value, attention_mask, scaling, softcap, s_aux)
        return out.transpose(1, 2), None
    if spec is not None and sliding_window is not None:
        raise ValueError("config.lcpatch names a layer that has a sliding window of its own")
    if spec is not None and spec.has_ratio and query.shape[2] != key.shape[2]:
        raise ValueError("this pattern's groups are a share of the whole sequence, which must come at once")
    if spec is None:
        rule = DENSE if sliding_window is None else Rule(back=sliding_window - 1)
        spec = BlockSparseSpec.of([rule] * query.shape[1])
    bounds = None if attention_mask is None else bounds_of(attention_mask)
    out, lse = block_sparse(query, key, value, spec, bounds=bounds, scale=scaling, softcap=softcap)
    if s_aux is not None:  # one more key with this score and value zero
        out = (out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2), None


def _spec(module: nn.Module, num_heads: int) -> BlockSparseSpec | None:
    """What the config says of this layer now; None: dense."""
    patch = getattr(module.config, "lcpatch", None)
    specs = patch.get("specs") if isinstance(patch, Mapping) else None
    if specs is None:
        _say("config.lcpatch carries no specs, so this is plain causal attention; save the model with a newer lcpatch")
        return None
    if str(patch.get("sinks") or "").startswith(("logit", "prefix")):
        raise ValueError("this model has learnable sinks, which only lcpatch.from_pretrained loads")
    mode = patch.get("mode")
    if mode not in ("train", "always", "never"):
        raise ValueError(f"config.lcpatch has mode={mode!r}; it must be 'train', 'always' or 'never'")
    if mode == "never" or (mode == "train" and not module.training):
        return None
    text = specs.get(str(module.layer_idx)) if isinstance(specs, Mapping) else ""
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > 12 * MAX_INTEGERS:
        raise ValueError(f"config.lcpatch: the spec of layer {module.layer_idx} is broken")
    return _parsed(text, module.layer_idx, num_heads)


@lru_cache(maxsize=1024)
def _parsed(text: str, layer: int, num_heads: int) -> BlockSparseSpec:
    broken = f"config.lcpatch: the spec of layer {layer} is broken"
    try:
        spec = BlockSparseSpec.from_ints([int(n) for n in text.split()])
        again = " ".join(map(str, spec.to_ints()))
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{broken}: {error}") from error
    if again != text:
        raise ValueError(broken)
    if spec.num_heads != num_heads:
        raise ValueError(f"{broken}: it is for {spec.num_heads} query heads, the layer has {num_heads}")
    return spec


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """A windowed layer under its own mask, in plain torch: no pattern of ours is in it."""
    if not softcap and s_aux is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(wide) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sink = s_aux.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1).nan_to_num()[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).to(query.dtype)


@lru_cache(maxsize=8)
def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)
