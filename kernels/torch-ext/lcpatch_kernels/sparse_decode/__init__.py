"""`sparse_decode`: attention of one new token per row over part of its cache: a pattern's keys, or a list of pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .._check import check_tensor
from .._impl import Impl, choose
from .._ops import add_op_namespace_prefix
from ..block_sparse.spec import DENSE, BlockSparseSpec

__all__ = ["DecodeImpl", "sparse_decode"]

DecodeImpl = Impl


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: BlockSparseSpec | None = None,
    bounds: Tensor | None = None,
    slots: Tensor | None = None,
    num_keys: Tensor | None = None,
    page_size: int = 1,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_scores: bool = False,
    impl: DecodeImpl = "auto",
) -> tuple[Tensor, ...]:
    """Attention of the newest token of each row. Inference only.

    Lengths are tensors, so a CUDA graph replays at any length.

    Which keys a row attends to comes either from a pattern (`spec`, `bounds`) or from a list (`slots`, `num_keys`).

    Args:
        q: [B, H, 1, D]; fp32, fp16, bf16 (float64: reference only).
        k, v: [B, K, S, D], any strides with a contiguous last dimension, in q's dtype, or int8 / float8 with scales.
        spec: the rule of each query head, asked for the row's last position; default, without `slots`: dense.
        bounds: int32 [B, 2] = (k0, k1): the row's tokens are the keys [k0, k1), the newest at k1 - 1; None: all S.
        slots: int32 [B, K, M]: the pages of S that each KV head attends to, each once; negative: none. A page must lie
            within S, which is not checked: they are on the device.
        num_keys: int32 [B, K]: how many keys of its list count, from the front; None: all.
        page_size: keys per page, a power of two; page n holds the keys [n page_size, (n + 1) page_size).
        bias: fp32 [B, K, S], added to the scores of a key (after the softcap): the log of the tokens it stands for.
        k_scale, v_scale: [B, K, S], what a quantised key or value is multiplied by.
        scale, softcap: as in `block_sparse`.
        return_scores: also return what the softmax is taken of.
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        `(out, lse)`: [B, H, 1, D] in q's dtype and [B, H, 1] in fp32 (float64 for float64); rows without keys get
        0 and -inf. With `return_scores` also the scores [B, H, S] in lse's dtype, bias and softcap included, -inf where
        a head does not attend: exp(scores - lse) are the probabilities, for which keys are not read again.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q in fp32
        q = q.to(torch.get_autocast_dtype(q.device.type))
    _check(q, k, v, spec, bounds, slots, num_keys, page_size, bias, k_scale, v_scale)
    if slots is None and spec is None:
        spec = BlockSparseSpec.of([DENSE] * q.shape[1])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    flat = [] if spec is None else spec.to_ints()
    lists = (bounds, slots, num_keys, page_size, bias, k_scale, v_scale)
    out, lse, scores = _forward(q, k, v, flat, *lists, scale, float(softcap or 0.0), return_scores, choose(impl, q))
    return (out, lse, scores) if return_scores else (out, lse)


def _check(
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
) -> None:
    if q.dim() != 4 or q.shape[2] != 1 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q [B, H, 1, D] and k, v [B, K, S, D] are wanted; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} do not fit together")
    if slots is not None and (spec is not None or bounds is not None):
        raise ValueError("give a pattern (spec, bounds) or a list (slots, num_keys), not both")
    if slots is None and num_keys is not None:
        raise ValueError("num_keys counts the keys of `slots`; with a pattern the length is said by `bounds`")
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size={page_size} must be a power of two")
    if spec is not None and (spec.num_heads != q.shape[1] or spec.is_cyclic):
        raise ValueError(f"spec must describe {q.shape[1]} query heads without rolled groups")
    quantised = k.dtype != q.dtype
    if v.dtype != k.dtype or quantised != (k_scale is not None) or quantised != (v_scale is not None):
        raise ValueError(
            "k and v must have q's dtype, or both another one with k_scale and v_scale; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    batch, num_kv_heads, size = k.shape[:3]
    wanted = {
        "bounds": (bounds, (batch, 2), torch.int32),
        "slots": (slots, (batch, num_kv_heads, None), torch.int32),
        "num_keys": (num_keys, (batch, num_kv_heads), torch.int32),
        "bias": (bias, (batch, num_kv_heads, size), torch.float32),
        "k_scale": (k_scale, (batch, num_kv_heads, size), None),
        "v_scale": (v_scale, (batch, num_kv_heads, size), None),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is not None:
            check_tensor(name, tensor, shape, dtype, q.device)


@torch.library.custom_op(add_op_namespace_prefix("flash_attn_sparse_decode"), mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Sequence[int],
    bounds: Tensor | None,
    slots: Tensor | None,
    num_keys: Tensor | None,
    page_size: int,
    bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    softcap: float,
    return_scores: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = BlockSparseSpec.from_ints(spec) if spec else None
    lists = (bounds, slots, num_keys, page_size, bias, k_scale, v_scale)
    out, lse, scores = _module(impl).forward(q, k, v, pattern, *lists, scale, softcap, return_scores)
    return out, lse, lse.new_empty(0) if scores is None else scores


@_forward.register_fake
def _(q, k, v, spec, bounds, slots, num_keys, page_size, bias, k_scale, v_scale, scale, softcap, return_scores, impl):
    out = q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3]).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return out, lse, lse.new_empty((*q.shape[:2], k.shape[2]) if return_scores else 0)


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        from . import reference

        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
