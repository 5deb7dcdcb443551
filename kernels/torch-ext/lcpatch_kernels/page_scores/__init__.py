"""`page_bounds` and `page_scores`: what a page of keys is remembered by, and how well a query may match it."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .._check import check_tensor
from .._impl import Impl, choose
from .._ops import add_op_namespace_prefix

__all__ = ["PageImpl", "page_bounds", "page_scores"]

PageImpl = Impl
Kind = Literal["upper", "lower"]


def page_bounds(
    k: Tensor, page_size: int, *, bounds: Tensor | None = None, impl: PageImpl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The least, the largest and the mean value of every channel in every page of keys. Inference only.

    Args:
        k: [B, K, S, D], rotated keys, any strides with a contiguous last dimension; fp32, fp16, bf16 (float64:
            reference only).
        page_size: keys a page; page n holds the keys [n page_size, (n + 1) page_size), the last one what is left.
        bounds: int32 [B, 2] = (k0, k1): the row's tokens are the keys [k0, k1), others count for nothing; None: all S.
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        `(low, high, mean)`, each [B, K, ceil(S / page_size), D] in k's dtype. The first two are values of k, so
        nothing is rounded. A page without tokens has low = inf, high = -inf, mean = 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.

    Source: Quest, arXiv 2406.10774 (low, high); ShadowKV, arXiv 2410.21465 (mean).
    """
    if k.dim() != 4 or not k.is_floating_point():
        raise ValueError(f"k [B, K, S, D] of a floating dtype is wanted; got {list(k.shape)} in {k.dtype}")
    if page_size < 1:
        raise ValueError(f"page_size={page_size} must be at least 1")
    if bounds is not None:
        check_tensor("bounds", bounds, (k.shape[0], 2), torch.int32, k.device)
    return _bounds(k, page_size, bounds, choose(impl, k))


def page_scores(
    q: Tensor, low: Tensor, high: Tensor | None = None, *, kind: Kind = "upper", impl: PageImpl = "auto"
) -> Tensor:
    """Bounds of q k over the keys of each page, for one query a row and head. Inference only.

    The upper bound is sum_d max(q_d low_d, q_d high_d): no key of the page scores more. The lower bound is the same
    with min. Both are two products: q = q⁺ + q⁻ by sign, upper = q⁺ high + q⁻ low.

    Args:
        q: [B, H, 1, D], rotated, in the dtype of the pages.
        low, high: [B, K, P, D] of `page_bounds`; K divides H, query head h reads KV head h // (H // K). `high=None`:
            the score is q low, for pages that one vector stands for (their mean).
        kind: "upper" or "lower".
        impl: as in `page_bounds`.

    Returns:
        fp32 [B, H, P] (float64 for float64), not scaled; -inf for a page without tokens (low > high). The bounds hold
        up to the rounding of a sum of D products.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    if q.dim() != 4 or q.shape[2] != 1 or low.dim() != 4:
        raise ValueError(
            f"q [B, H, 1, D] and low, high [B, K, P, D] are wanted; got {list(q.shape)}, {list(low.shape)}"
        )
    if (q.shape[0], q.shape[3]) != (low.shape[0], low.shape[3]) or q.shape[1] % low.shape[1]:
        raise ValueError(f"q {list(q.shape)} and pages {list(low.shape)} do not fit together")
    check_tensor("low", low, low.shape, q.dtype, q.device)
    if high is not None:
        check_tensor("high", high, low.shape, q.dtype, q.device)
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, get_args(Kind)))}")
    return _scores(q, low, high, kind == "lower", choose(impl, q))


@torch.library.custom_op(add_op_namespace_prefix("page_bounds"), mutates_args=())
def _bounds(k: Tensor, page_size: int, bounds: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return _module(impl).bounds_of(k, page_size, bounds)


@_bounds.register_fake
def _(k, page_size, bounds, impl):
    shape = (*k.shape[:2], -(-k.shape[2] // page_size), k.shape[3])
    return k.new_empty(shape), k.new_empty(shape), k.new_empty(shape)


@torch.library.custom_op(add_op_namespace_prefix("page_scores"), mutates_args=())
def _scores(q: Tensor, low: Tensor, high: Tensor | None, lower: bool, impl: str) -> Tensor:
    return _module(impl).scores(q, low, high, lower)


@_scores.register_fake
def _(q, low, high, lower, impl):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:2], low.shape[2]), dtype=dtype)


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        from . import reference

        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
