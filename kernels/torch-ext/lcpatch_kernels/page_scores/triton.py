"""Bounds and scores of pages in Triton: each key is read once for its page's bounds, each page once for its scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse._triton_common import INTERPRETED, _load

BLOCK_N = 32  # keys of a page that are read at a time
BLOCK_P = 32  # pages of a program that scores


def bounds_of(k: Tensor, page_size: int, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.bounds_of`."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    bounds = None if bounds is None else bounds.contiguous()
    batch, heads, size, head_dim = k.shape
    pages = triton.cdiv(size, page_size)
    low, high, mean = (k.new_empty(batch, heads, pages, head_dim) for _ in range(3))
    if low.numel():
        with torch.cuda.device_of(k):
            _bounds_kernel[(pages, heads, batch)](
                k, low, high, mean, bounds, *k.stride()[:3], size, heads, page_size,
                D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_N=BLOCK_N, num_warps=4,
            )  # fmt: skip
    return low, high, mean


def scores(q: Tensor, low: Tensor, high: Tensor | None, lower: bool) -> Tensor:
    """As `reference.scores`."""
    q, low, high = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, low, high))
    batch, heads, _, head_dim = q.shape
    num_kv_heads, pages = low.shape[1:3]
    out = torch.empty((batch, heads, pages), dtype=torch.float32, device=q.device)
    if out.numel():
        other = low if high is None else high
        with torch.cuda.device_of(q):
            _scores_kernel[(triton.cdiv(pages, BLOCK_P), num_kv_heads, batch)](
                q, low, other, out, *q.stride()[:2], *low.stride()[:3], *other.stride()[:3],
                pages, heads, heads // num_kv_heads,
                D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
                GROUP=max(16, triton.next_power_of_2(heads // num_kv_heads)), BLOCK_P=BLOCK_P,
                HAS_BOUNDS=high is not None, LOWER=lower,
                UPCAST=INTERPRETED and q.dtype != torch.float32, num_warps=4,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "K", "page_size"])
def _bounds_kernel(
    p_k,
    p_low,
    p_high,
    p_mean,
    p_bounds,
    stride_kb,
    stride_kh,
    stride_ks,
    S,
    K,
    page_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_page, i_head, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, end = i_page * page_size, tl.minimum((i_page + 1) * page_size, S)
    if p_bounds is not None:
        begin = tl.maximum(begin, tl.load(p_bounds + 2 * i_batch))
        end = tl.minimum(end, tl.load(p_bounds + 2 * i_batch + 1))
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    p_k += i_batch * stride_kb + i_head * stride_kh
    for start in range(begin, end, BLOCK_N):
        inside = start + o_n < end
        x = _load(p_k, (start + o_n).to(tl.int64) * stride_ks, inside, D, BLOCK_D, True, True)
        low = tl.minimum(low, tl.min(tl.where(inside[:, None], x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside[:, None], x, float("-inf")), 0))
        total += tl.sum(x, 0)
    out = ((i_batch * K + i_head) * tl.num_programs(0) + i_page) * D + o_d
    tl.store(p_low + out, low.to(p_low.dtype.element_ty), o_d < D)
    tl.store(p_high + out, high.to(p_high.dtype.element_ty), o_d < D)
    tl.store(p_mean + out, (total / tl.maximum(end - begin, 1)).to(p_mean.dtype.element_ty), o_d < D)


@triton.jit(do_not_specialize=["P", "H", "group"])
def _scores_kernel(
    p_q,
    p_low,
    p_high,
    p_out,
    stride_qb,
    stride_qh,
    stride_lb,
    stride_lh,
    stride_lp,
    stride_hb,
    stride_hh,
    stride_hp,
    P,
    H,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    LOWER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_kv, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_g = tl.arange(0, GROUP)
    head = i_kv * group + o_g
    q = _load(p_q + i_batch * stride_qb, head * stride_qh, o_g < group, D, BLOCK_D, True, UPCAST)
    page = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = page < P
    o_p = page.to(tl.int64)
    low = _load(p_low + i_batch * stride_lb + i_kv * stride_lh, o_p * stride_lp, inside, D, BLOCK_D, True, UPCAST)
    if HAS_BOUNDS:
        p_high += i_batch * stride_hb + i_kv * stride_hh
        high = _load(p_high, o_p * stride_hp, inside, D, BLOCK_D, True, UPCAST)
        empty = tl.max((low > high).to(tl.int32), 1) > 0
        low, high = tl.where(empty[:, None], 0.0, low).to(q.dtype), tl.where(empty[:, None], 0.0, high).to(q.dtype)
        above, below = tl.where(q > 0, q, 0.0).to(q.dtype), tl.where(q < 0, q, 0.0).to(q.dtype)
        if LOWER:
            low, high = high, low
        s = tl.dot(above, tl.trans(high), input_precision="ieee")
        s = tl.dot(below, tl.trans(low), s, input_precision="ieee")
        s = tl.where(empty[None, :], float("-inf"), s)
    else:
        s = tl.dot(q, tl.trans(low), input_precision="ieee")
    p_out += (i_batch * H + head)[:, None] * P + page[None, :]
    tl.store(p_out, s, (o_g < group)[:, None] & inside[None, :])
