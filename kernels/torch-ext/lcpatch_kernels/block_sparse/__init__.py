"""`block_sparse`: attention under a `BlockSparseSpec`, with log-sum-exp, one op for every implementation."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .._check import check_tensor
from .._ops import add_op_namespace_prefix
from . import dense, reference
from .spec import DENSE, UNBOUNDED, BlockSparseSpec, Pack, Rule

__all__ = [
    "DENSE",
    "UNBOUNDED",
    "BlockSparseSpec",
    "Impl",
    "Pack",
    "Rule",
    "block_sparse",
    "block_sparse_backward",
    "choose",
    "dense",
]

logger = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "reference", "sdpa", "flex"]
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256
FLEX_MIN_HEAD_DIM = 16
"""Below it torch refuses to compile FlexAttention."""


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSparseSpec,
    *,
    bounds: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query head over the keys that its rule allows; both results are differentiable in q, k and v.

    Args:
        q: [B, H, T, D], any strides with a contiguous last dimension; fp32, fp16, bf16 (float64: not on triton).
        k, v: [B, K, S, D], the same dtype; K divides H, and query head h reads KV head h // (H // K).
        spec: the rule of each query head. Positions count from the first token of a segment.
        bounds: int32 [B or 1, N, 4 or 5], up to N segments a row as (q0, q1, k0, k1): queries [q0, q1) attend within
            keys [k0, k1), aligned at their ends, so q1 - q0 <= k1 - k0. This is how padding (one segment per row),
            packed documents (several) and static caches (k1 < S) are said. Empty segments have q0 = q1; a token belongs
            to one segment at most. None: one segment per row, all T queries and all S keys. With a fifth column, `gap`,
            the last query stands that many positions after the last key (q1 - q0 <= k1 - k0 + gap): part of a
            sequence against keys that lie further back, to be merged by LSE.
        scale: factor of q k^T; default 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); None or 0: as they are.
        bias: fp32 [B, K, S], added to the scores of a key (after the softcap): the log of the tokens it stands for.
            Inference only, by "triton" and "reference".
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference" (plain torch, tile by tile), "sdpa" (dense
            mask, small sizes), "flex" (FlexAttention), or "auto": triton on CUDA, reference on CPU.

    Returns:
        `(out, lse)`: [B, H, T, D] in q's dtype (stored as [B, T, H, D]) and the natural-log sum of exponentials
        [B, H, T] in fp32 (float64 for float64). Queries that see no key get 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q and k in fp32 beside a half-precision v
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, spec, bounds)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    softcap = float(softcap or 0.0)
    chosen = choose(impl, q, spec)
    if bias is not None:
        check_tensor("bias", bias, k.shape[:3], torch.float32, k.device)
        if chosen not in ("triton", "reference"):
            raise ValueError(f"impl={chosen!r} takes no bias; use impl='triton' or 'reference'")
        return _forward_biased(q, k, v, bounds, bias, spec.to_ints(), scale, softcap, chosen)
    if chosen == "sdpa":
        return dense.attention(q, k, v, spec, bounds, scale, softcap)
    if chosen == "flex":
        return dense.flex(q, k, v, spec, bounds, scale, softcap)
    return _forward(q, k, v, bounds, spec.to_ints(), scale, softcap, chosen)


def block_sparse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: BlockSparseSpec,
    *,
    bounds: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of `block_sparse`, for callers that keep its inputs elsewhere than on autograd's graph.

    k and v may also be a part of the keys: with `out` and `lse` of whole rows, the gradients of all parts add up to
    those of the whole. Of `out` only delta = rowsum(grad_out * out) - grad_lse is used, so who has that passes zeros
    for `out` and -delta for `grad_lse`.

    Args:
        grad_out, grad_lse: gradients of its two results.
        out, lse: the two results.
        q, k, v, spec, bounds, scale, softcap, impl: as it was given them; "sdpa" and "flex" have no backward to call.

    Raises:
        ValueError, ImportError: an `impl` that cannot run this.
    """
    _check(q, k, v, spec, bounds)
    chosen = choose(impl, q, spec)
    if chosen not in ("triton", "reference"):
        raise ValueError(f"impl={chosen!r} leaves its gradients to autograd; use impl='triton' or 'reference'")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    ints = spec.to_ints()
    return _backward(grad_out, grad_lse, q, k, v, out, lse, bounds, ints, scale, float(softcap or 0.0), chosen)


def choose(impl: str, q: Tensor, spec: BlockSparseSpec) -> str:
    """The implementation that `impl` means for these inputs; says once, at log level INFO, what "auto" chose.

    Raises:
        ValueError: an unknown `impl`, or one that cannot run these inputs.
        ImportError: "triton" where triton is not installed.
    """
    if impl == "auto":
        chosen, why = _automatic(q, spec)
        if not torch.compiler.is_compiling():  # a log call would break the graph
            _say(f"block_sparse: impl='auto' chose '{chosen}': {why}")
        return chosen
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, get_args(Impl)))}")
    if impl == "triton":
        if not has_triton():
            raise ImportError(
                "impl='triton' needs triton, which is not installed: pip install triton (or 'lcpatch[kernels]')"
            )
        if problem := _triton_problem(q, spec):
            raise ValueError(f"impl='triton' cannot run here: {problem}; use impl='auto'")
    if impl == "reference" and spec.is_cyclic:
        raise ValueError("impl='reference' cannot run cyclic (rolled) groups; use impl='sdpa', 'flex' or 'auto'")
    return impl


@torch.compiler.assume_constant_result  # dynamo of torch before 2.13 breaks the graph at find_spec
def has_triton() -> bool:
    """Whether triton can be imported; asked without importing it."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether triton runs its kernels on the CPU, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _automatic(q: Tensor, spec: BlockSparseSpec) -> tuple[str, str]:
    if spec.is_cyclic:
        why = "rolled groups are not causal intervals, so no kernel of ours fits them"
        if q.is_cuda and q.dtype in TRITON_DTYPES and q.shape[-1] >= FLEX_MIN_HEAD_DIM:
            return "flex", why
        return "sdpa", why + "; this builds a T x T mask"
    if not q.is_cuda:
        return "reference", f"the tensors are on {q.device.type}"
    if not has_triton():
        return "reference", "triton is not installed; pip install 'lcpatch[kernels]' for the fast kernels"
    if problem := _triton_problem(q, spec):
        return "reference", problem
    return "triton", "CUDA and triton are here"


def _triton_problem(q: Tensor, spec: BlockSparseSpec) -> str | None:
    if not q.is_cuda and not interpreting():
        return f"the tensors are on {q.device.type} and TRITON_INTERPRET=1 is not set"
    if spec.is_cyclic:
        return "rolled groups are not causal intervals"
    if q.dtype not in TRITON_DTYPES:
        return f"{q.dtype} is not one of {', '.join(map(str, TRITON_DTYPES))}"
    if q.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is above {TRITON_MAX_HEAD_DIM}"
    return None


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    logger.info(message)


def _check(q: Tensor, k: Tensor, v: Tensor, spec: BlockSparseSpec, bounds: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q [B, H, T, D] and k, v [B, K, S, D] are wanted; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} differ in batch or head dim")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be grouped over {k.shape[1]} KV heads")
    if spec.num_heads != q.shape[1]:
        raise ValueError(f"the spec describes {spec.num_heads} query heads, q has {q.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must share one device; got {q.device}, {k.device}, {v.device}")
    if bounds is None:
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"{q.shape[2]} queries need at least as many keys; got {k.shape[2]}")
    elif bounds.dim() != 3 or bounds.shape[0] not in (1, q.shape[0]) or bounds.shape[2] not in (4, 5):
        raise ValueError(f"bounds must be [{q.shape[0]} or 1, N, 4 or 5]; got {list(bounds.shape)}")
    elif bounds.dtype != torch.int32 or bounds.device != q.device:
        raise ValueError(f"bounds must be int32 on {q.device}; got {bounds.dtype} on {bounds.device}")


# The ops. `flash_attn` in their names is what selective recomputation policies look for, to keep their results.


@torch.library.custom_op(add_op_namespace_prefix("flash_attn_block_sparse"), mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    spec: Sequence[int],
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    bounds = None if bounds is None else bounds.expand(q.shape[0], -1, -1)
    return _module(impl).forward(q, k, v, BlockSparseSpec.from_ints(spec), bounds, scale, softcap)


@_forward.register_fake
def _(q, k, v, bounds, spec, scale, softcap, impl):
    return _empty_results(q)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op(add_op_namespace_prefix("flash_attn_block_sparse_biased"), mutates_args=())
def _forward_biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    bias: Tensor,
    spec: Sequence[int],
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    bounds = None if bounds is None else bounds.expand(q.shape[0], -1, -1)
    return _module(impl).forward(q, k, v, BlockSparseSpec.from_ints(spec), bounds, scale, softcap, bias)


@_forward_biased.register_fake
def _(q, k, v, bounds, bias, spec, scale, softcap, impl):
    return _empty_results(q)


@torch.library.custom_op(add_op_namespace_prefix("flash_attn_block_sparse_backward"), mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    spec: Sequence[int],
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = None if bounds is None else bounds.expand(q.shape[0], -1, -1)
    spec_ = BlockSparseSpec.from_ints(spec)
    return _module(impl).backward(grad_out, grad_lse, q, k, v, out, lse, spec_, bounds, scale, softcap)


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, bounds, spec, scale, softcap, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bounds, ctx.spec, ctx.scale, ctx.softcap, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _differentiate(ctx, grad_out, grad_lse):
    q, k, v, out, lse, bounds = ctx.saved_tensors
    args = (q, k, v, out, lse, bounds, ctx.spec, ctx.scale, ctx.softcap, ctx.impl)
    return *_backward(grad_out, grad_lse, *args), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
