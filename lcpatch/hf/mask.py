"""Our mask function: instead of a T x T mask it says where the real tokens are.

What it is asked for beyond full causal attention (sliding windows, chunks, bidirectional prefixes) belongs to layers
that are not patched, and goes to the mask function of the implementation that those layers run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function

from .bounds import compact, from_padding, from_starts, split
from .state import dense_name

_expanded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # compact mask -> {implementation: the mask it wants}
_unpacked: WeakIdKeyDictionary = WeakIdKeyDictionary()  # windowed layers' mask that knows no documents -> compact mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """The mask of one forward, called by transformers once per kind of layer.

    Returns:
        A compact mask (see `bounds`); None where nothing needs saying (no padding, and queries and keys coincide; or no
        keys are asked about); for layers that are not ours, what their implementation wants.
    """
    if kv_length == 0:  # a cache's layer that knows by itself what its queries may see
        return None
    dense = dense_name(config)
    device = torch.device(device)
    starts = _document_starts(mask_function, batch_size, q_length, kv_length, device)
    seen = q_offset + q_length - kv_offset
    real = None if attention_mask is None else _fit(attention_mask, kv_length, kv_offset)
    if kwargs.get("local_size") is not None or kwargs.get("use_vmap") or starts is False:
        if dense not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None
        theirs = ALL_MASK_ATTENTION_FUNCTIONS[dense](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            device=device,
            **kwargs,
        )
        if isinstance(theirs, Tensor) and isinstance(starts, Tensor) and not bool(starts.any()):
            nothing = _says_nothing(real, q_length, kv_length, seen)
            _unpacked[theirs] = None if nothing else compact(from_padding(real, batch_size, q_length, seen, device), 0)
        return theirs
    if starts is not None:
        return compact(from_starts(starts), 0)
    if _says_nothing(real, q_length, kv_length, seen) and (dense == "sdpa" or "flash" in dense):
        return None
    return compact(from_padding(real, batch_size, q_length, seen, device), seen - q_length)


def knows_no_documents(mask: Any) -> bool:
    """Whether `mask` is a windowed layer's that `mask` above made without having been told of packing."""
    return not torch.compiler.is_compiling() and isinstance(mask, Tensor) and mask in _unpacked


def padding_of(mask: Tensor) -> Tensor | None:
    """The compact mask of the padding in a mask that `knows_no_documents`; None: no padding."""
    return _unpacked[mask]


def expand(mask: Tensor, dense: str, num_queries: int, num_keys: int, dtype: torch.dtype, config: Any) -> Any:
    """The mask that implementation `dense` wants, from a compact one: the same that transformers would have made.

    Memoised by the compact mask's identity, so a forward makes it once.
    """
    tracing = torch.compiler.is_compiling()
    key = (dense, num_queries, num_keys, dtype)
    known = None if tracing else _expanded.setdefault(mask, {})
    if known is not None and key in known:
        return known[key]
    if dense not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    bounds, q_offset = split(mask)
    token = torch.arange(num_keys, device=mask.device)
    inside = (token >= bounds[..., 2:3]) & (token < bounds[..., 3:4])  # [B, N, S]
    function = causal_mask_function
    if bounds.shape[1] > 1:
        document = torch.where(inside.any(1), inside.int().argmax(1), -1)
        function = and_masks(function, lambda b, h, q, kv: document[b, q] == document[b, kv])
    real = inside.any(1)
    result = ALL_MASK_ATTENTION_FUNCTIONS[dense](
        batch_size=mask.shape[0],
        q_length=num_queries,
        kv_length=num_keys,
        q_offset=q_offset if tracing else int(q_offset),
        kv_offset=0,
        mask_function=function,
        attention_mask=real if tracing or not bool(real.all()) else None,
        allow_is_causal_skip=bounds.shape[1] == 1,
        dtype=dtype,
        config=config,
        device=mask.device,
    )
    if known is not None:
        known[key] = result
    return result


def _fit(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a 2-D mask that belongs to the keys at hand; what it does not reach (a static cache) is not real."""
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _says_nothing(real: Tensor | None, q_length: int, kv_length: int, seen: int | Tensor) -> bool:
    if q_length not in (1, kv_length):
        return False
    if torch.compiler.is_compiling():  # no reading back: only what is known while tracing counts
        return real is None and isinstance(seen, int) and seen == kv_length
    return bool(seen == kv_length) and (real is None or bool(real.all()))


def _document_starts(
    mask_function: Callable, batch: int, q_length: int, kv_length: int, device: torch.device
) -> Tensor | bool | None:
    """None for plain causal attention, bool [B, T] for packed documents, False for anything else.

    transformers says packing as a function of index pairs. Asking it about neighbours is enough: (q, q - 1) is false
    where a document starts, and (q, q + 1) is false everywhere unless the mask is not causal.
    """
    if mask_function is causal_mask_function:
        return None
    if q_length != kv_length:
        return False
    if torch.compiler.is_compiling():  # transformers always assumes packing here; see bounds.from_positions
        return None
    row = torch.arange(batch, device=device)[:, None]
    token = torch.arange(q_length, device=device)[None]

    def sees(offset: int) -> Tensor:
        return mask_function(row, 0, token, (token + offset).clamp(0, kv_length - 1)).expand(batch, -1)

    if bool(sees(+1)[:, :-1].any()) or not bool(sees(0).all()):
        return False
    return ~sees(-1)
