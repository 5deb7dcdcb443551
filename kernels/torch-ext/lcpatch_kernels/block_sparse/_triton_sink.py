"""dk and dv of the sink keys from the rows that see them only as sinks.

All rows see these few keys, so in the dk and dv kernel one program would walk all rows for them while every other walks
a window: at 32K tokens 10 of `sink`'s 12 ms. Here programs share the rows, each adding up one partial sum; the sum over
the programs (a fixed order: the same bits every run) is where the keys' own tile takes it on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_bwd import _probabilities, _row_vector
from ._triton_common import VARYING, _last_row, _lo, _load, _rule


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
        # Rows whose interval holds key 0 see no key as a sink.
        start = tl.maximum(i_begin, _last_row(rule, 0) + 1)
        num_tiles = tl.where(rule[0] > 0, tl.cdiv(tl.maximum(i_end - start, 0), BLOCK_M), 0)
        for u in range(num_tiles * num_heads):
            head, i_m = first_head + u % num_heads, start + u // num_heads * BLOCK_M + o_m
            real = i_m < i_end
            row, head = (row0 + i_m).to(tl.int64), head.to(tl.int64)
            q = _load(p_q + i_batch * stride_qb + head * stride_qh, row * stride_qt, real, D, BLOCK_D, True, UPCAST)
            do = _load(p_do + i_batch * stride_gb + head * stride_gh, row * stride_gt, real, D, BLOCK_D, True, UPCAST)
            o_line = (i_batch * H + head) * stride_line
            lse = _row_vector(p_lse + o_line, row, real, float("inf"), COPIES)
            delta = _row_vector(p_delta + o_line, row, real, 0.0, COPIES)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            p, slope = _probabilities(s, lse[None, :], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            p = tl.where(j_n[:, None] < tl.minimum(rule[0], _lo(rule, i_m))[None, :], p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    o_d = tl.arange(0, BLOCK_D)
    p_sum = p_sums + (slot.to(tl.int64) * num_rows + i_row) * (2 * SINKS * D) + j_n[:, None] * D + o_d[None, :]
    inside = (j_n[:, None] >= 0) & (o_d[None, :] < D)
    tl.store(p_sum, dk, inside)
    tl.store(p_sum + SINKS * D, dv, inside)
