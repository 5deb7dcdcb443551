"""dk and dv of the sink keys.

All rows see these few keys, so in the dk and dv kernel one program would walk all rows for them while every other walks
a window: at 32K tokens 10 of `sink`'s 12 ms. Here programs share the rows, each writing a partial sum, and a second
kernel adds those up in order: the same bits every run. The dk and dv kernel then leaves the sinks out of its rules, and
what it writes for these keys is overwritten: taking the sums on instead cost it 130 bytes more of spilled registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_bwd import _probabilities, _row_vector
from ._triton_common import VARYING, _keep, _last_row, _lo, _load, _rule, _store


@triton.jit(do_not_specialize=VARYING)
def _bwd_sink_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_sums,  # [programs of a KV head, B, K, (dk, dv), SINKS, D]
    p_lse,
    p_delta,
    p_bounds,
    p_packs,
    p_starts,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_line,
    stride_bounds,
    num_rows,  # B K
    num_kv_heads,
    chunk,  # query rows of a program
    H,
    T,
    S,
    qk_scale,
    cap_in,
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SINKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COPIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    slot, i_row = tl.program_id(0) // num_rows, tl.program_id(0) % num_rows
    i_batch, i_kv = (i_row // num_kv_heads).to(tl.int64), (i_row % num_kv_heads).to(tl.int64)
    if SEGMENTS:  # one a batch row
        p_row = p_bounds + i_batch * stride_bounds
        q0, k0 = tl.load(p_row), tl.load(p_row + 2)
        length = tl.load(p_row + 3) - k0
        first = length - (tl.load(p_row + 1) - q0)
    else:
        q0, k0, length, first = 0 * slot, 0 * slot, S + 0 * slot, S - T
    row0 = q0 - first  # the row of position 0
    i_begin = first + slot * chunk
    i_end = tl.minimum(i_begin + chunk, length)

    o_m, j_n = tl.arange(0, BLOCK_M), tl.arange(0, SINKS)
    o_k = (k0 + j_n).to(tl.int64)
    k = _load(p_k + i_batch * stride_kb + i_kv * stride_kh, o_k * stride_ks, j_n < length, D, BLOCK_D, True, UPCAST)
    v = _load(p_v + i_batch * stride_vb + i_kv * stride_vh, o_k * stride_vs, j_n < length, D, BLOCK_D, True, UPCAST)
    dk = tl.zeros([SINKS, BLOCK_D], tl.float32)
    dv = tl.zeros([SINKS, BLOCK_D], tl.float32)
    for i_pack in range(tl.load(p_starts + i_kv), tl.load(p_starts + i_kv + 1)):
        p_pack = p_packs + i_pack * 10
        first_head, num_heads = tl.load(p_pack), tl.load(p_pack + 1)
        rule = _rule(p_pack, length, HAS_RATIO)
        until = tl.where(rule[0] > 0, i_end, tl.minimum(i_end, _last_row(rule, SINKS - 1) + 1))
        num_tiles = tl.cdiv(tl.maximum(until - i_begin, 0), BLOCK_M)
        for u in range(num_tiles * num_heads):
            head, i_m = first_head + u % num_heads, i_begin + u // num_heads * BLOCK_M + o_m
            real = i_m < until
            row, head = (row0 + i_m).to(tl.int64), head.to(tl.int64)
            q = _load(p_q + i_batch * stride_qb + head * stride_qh, row * stride_qt, real, D, BLOCK_D, True, UPCAST)
            do = _load(p_do + i_batch * stride_gb + head * stride_gh, row * stride_gt, real, D, BLOCK_D, True, UPCAST)
            o_line = (i_batch * H + head) * stride_line
            lse = _row_vector(p_lse + o_line, row, real, float("inf"), COPIES)
            delta = _row_vector(p_delta + o_line, row, real, 0.0, COPIES)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            p, slope = _probabilities(s, lse[None, :], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            p = tl.where(_keep(rule, i_m[None, :], j_n[:, None], _lo(rule, i_m)[None, :], 1, True, False), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    base = p_sums + (slot.to(tl.int64) * num_rows + i_row) * (2 * SINKS * D)
    _store(base, j_n * D, j_n >= 0, dk, D, BLOCK_D)
    _store(base + SINKS * D, j_n * D, j_n >= 0, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _sum_sinks_kernel(
    p_sums,
    p_dk,
    p_dv,
    p_bounds,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_bounds,
    num_rows,
    num_slots,
    num_kv_heads,
    num_sinks,
    S,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Write the first `num_sinks` keys' dk and dv: the partial sums of one KV head of a batch row, in order."""
    i_row = tl.program_id(0)
    i_batch, i_kv = (i_row // num_kv_heads).to(tl.int64), (i_row % num_kv_heads).to(tl.int64)
    if SEGMENTS:
        k0 = tl.load(p_bounds + i_batch * stride_bounds + 2)
        length = tl.load(p_bounds + i_batch * stride_bounds + 3) - k0
    else:
        k0, length = 0 * i_row, S + 0 * i_row
    j_n = tl.arange(0, SINKS)
    inside = j_n < tl.minimum(num_sinks, length)
    dk = tl.zeros([SINKS, BLOCK_D], tl.float32)
    dv = tl.zeros([SINKS, BLOCK_D], tl.float32)
    base = p_sums + i_row.to(tl.int64) * (2 * SINKS * D)
    for _ in range(num_slots):
        dk += _load(base, j_n * D, inside, D, BLOCK_D, True, False)
        dv += _load(base + SINKS * D, j_n * D, inside, D, BLOCK_D, True, False)
        base += num_rows * (2 * SINKS * D)
    o_dk = i_batch * stride_dkb + i_kv * stride_dkh + (k0 + j_n).to(tl.int64) * stride_dks
    _store(p_dk, o_dk, inside, dk * scale, D, BLOCK_D)
    _store(p_dv, o_dk, inside, dv, D, BLOCK_D)
