"""`attn_mass`: how much attention each key was given in all, from the LSE that attention returned."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .._impl import Impl, choose
from .._ops import add_op_namespace_prefix

__all__ = ["MassImpl", "Reduce", "attn_mass"]

MassImpl = Impl
Reduce = Literal["sum", "mean", "max"]


def attn_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    bounds: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    reduce: Reduce = "sum",
    impl: MassImpl = "auto",
) -> Tensor:
    """Column sums of causal attention: mass[j] = sum_i exp(score(i, j) - lse[i]). Inference only.

    One more product of queries and keys, no values, and nothing of size T x S. With it H2O's accumulated scores
    (arXiv 2306.14048) cost neither eager attention nor a T x T matrix.

    Args:
        q: [B, H, T, D], any strides with a contiguous last dimension; fp32, fp16, bf16 (float64: reference only).
        k: [B, K, S, D], the same dtype; K divides H.
        lse: [B, H, T], natural log, of the attention that q had; -inf for queries that attend to nothing.
        bounds: int32 [B or 1, 1, 4] = (q0, q1, k0, k1), as in `block_sparse`, one segment a row; None: all, aligned at
            the ends.
        scale, softcap: those of the attention.
        reduce: how the query heads of a KV head are put together: "sum", "mean" or "max" of their column sums.
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        fp32 [B, K, S] (float64 for float64); keys of no segment get 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    _check(q, k, lse, bounds, reduce)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _forward(q, k, lse, bounds, scale, float(softcap or 0.0), reduce, choose(impl, q))


def _check(q: Tensor, k: Tensor, lse: Tensor, bounds: Tensor | None, reduce: str) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q [B, H, T, D] and k [B, K, S, D] are wanted; got {list(q.shape)}, {list(k.shape)}")
    if lse.shape != q.shape[:3] or not lse.is_floating_point():
        raise ValueError(f"lse must be {list(q.shape[:3])} and floating; got {list(lse.shape)} in {lse.dtype}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q and k must share one floating dtype; got {q.dtype}, {k.dtype}")
    if not q.device == k.device == lse.device:
        raise ValueError(f"q, k and lse must share one device; got {q.device}, {k.device}, {lse.device}")
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce={reduce!r} is not one of {', '.join(map(repr, get_args(Reduce)))}")
    if bounds is None:
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"{q.shape[2]} queries need at least as many keys; got {k.shape[2]}")
    elif bounds.dim() != 3 or bounds.shape[0] not in (1, q.shape[0]) or bounds.shape[1:] != (1, 4):
        raise ValueError(f"bounds must be [{q.shape[0]} or 1, 1, 4]; got {list(bounds.shape)}")
    elif bounds.dtype != torch.int32 or bounds.device != q.device:
        raise ValueError(f"bounds must be int32 on {q.device}; got {bounds.dtype} on {bounds.device}")


@torch.library.custom_op(add_op_namespace_prefix("attn_mass"), mutates_args=())
def _forward(
    q: Tensor, k: Tensor, lse: Tensor, bounds: Tensor | None, scale: float, softcap: float, reduce: str, impl: str
) -> Tensor:
    bounds = None if bounds is None else bounds.expand(q.shape[0], -1, -1)
    return _module(impl).forward(q, k, lse, bounds, scale, softcap, reduce)


@_forward.register_fake
def _(q, k, lse, bounds, scale, softcap, reduce, impl):
    return q.new_empty(k.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        from . import reference

        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
