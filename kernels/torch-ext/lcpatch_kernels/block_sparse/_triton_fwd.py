"""Forward kernel: one program = the stacked query heads of a pack x BLOCK_M positions.

A softmax needs some number to subtract from a row's scores, so that no exponential overflows, and any number close
enough will do. The usual one, the largest score so far, costs the loop a maximum over every score and a rescaling of
the whole accumulator whenever it grows: half of its instructions beside the exponentials. Every row here sees its own
key, so the row's score with itself is a number at hand before the loop starts (FIXED), and as large as the largest to
within what fp32 and bf16 can hold: 2^64 is 44 nats above. Where a row's sums grow beyond that, its tile is computed
once more, with the running maximum. fp16 holds only 2^16, so it takes the running maximum at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_common import (
    VARYING,
    _fast_key,
    _find_segment,
    _full_keys,
    _keep,
    _lo,
    _load,
    _load_box,
    _masked_keys,
    _rule,
    _steps,
    _store,
    _tanh,
)

LARGEST = tl.constexpr(2.0**64)  # of a row's sum of exponentials, in units of its own key's


@triton.jit
def _query_tile(
    p_bounds,
    stride_bounds,
    num_segments,
    num_slots,
    num_packs,
    T,
    S,
    BLOCK_M: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GAP: tl.constexpr,
):
    """Which tile this program works on: (found, i_batch, i_pack, q0, k0, first, length, num_keys, i0).

    Heads vary slowest, so that the programs in flight share their keys in L2; within a head the longest rows go first.
    """
    pid = tl.program_id(0)
    slot = pid % num_slots
    i_pack = pid // num_slots % num_packs
    i_batch = (pid // num_slots // num_packs).to(tl.int64)
    if SEGMENTS:
        p_row = p_bounds + i_batch * stride_bounds
        found, q0, k0, first, length, num_keys, tile = _find_segment(
            p_row, num_segments, slot, BLOCK_M, SEGMENTS, GAP, False
        )
    else:
        found, q0, k0, length = slot >= 0, 0 * slot, 0 * slot, S + 0 * slot
        num_keys = length
        first = length - T
        tile = first // BLOCK_M + num_slots - 1 - slot
    return found, i_batch, i_pack, q0, k0, first, length, num_keys, tile * BLOCK_M


@triton.jit
def _walk(
    q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_bias,
    stride_ks,
    stride_vs,
    i_batch,
    i_kv,
    k0,
    S,
    steps,
    rule,
    i_m,
    top,
    qk_scale,
    cap_in,
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    RUNNING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(acc, total, top): sums of exp2(s - top) v and exp2(s - top) over the keys of these rows, s in base 2.

    RUNNING: `top` follows the largest score so far, as is usual. Otherwise it stays what it is, and the loop has no
    maximum, no rescaling of `acc`, and no chain from step to step but the two sums.
    """
    lo_m = _lo(rule, i_m)
    acc = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)

    # Outside of segments a key past the last row is either not there or finite: the diagonal may go the fast way too.
    FOLD: tl.constexpr = TMA and SEGMENTS == 0
    SCALED: tl.constexpr = HAS_SOFTCAP or HAS_BIAS  # scores are final before their maximum is taken
    diagonal = steps[2] if FOLD else 0
    # A loop that may run zero times merges its initial accumulator with one still being multiplied into, for which
    # ptxas (C7515) makes every matrix instruction of the kernel wait for the one before: hence the `if`s.
    if steps[0] > diagonal:
        for t in range(diagonal, steps[0]):
            j, inside = _masked_keys(steps, rule, t, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
            o_j = j.to(tl.int64)
            k = _load(p_k, o_j * stride_ks, inside, D, BLOCK_D, True, UPCAST)
            v = _load(p_v, o_j * stride_vs, inside, D, BLOCK_D, True, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = cap_out * _tanh(s * cap_in) if HAS_SOFTCAP else s * qk_scale
            if HAS_BIAS:
                s += tl.load(p_bias + j, inside, 0.0)[None, :] * 1.4426950408889634
            keep = _keep(rule, i_m[:, None], j[None, :], lo_m[:, None], BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
            s = tl.where(keep & inside[None, :], s, float("-inf"))
            if RUNNING:
                top_new = tl.maximum(top, tl.max(s, 1))
                alpha = tl.exp2(top - top_new)
                total *= alpha
                acc *= alpha[:, None]
                top = top_new
            p = tl.exp2(s - top[:, None])
            total += tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

    if diagonal + steps[1] > 0:
        for t in range(diagonal + steps[1]):
            if TMA:
                j0 = _fast_key(steps, rule, t, diagonal, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
                k = _load_box(d_k, i_batch, i_kv, k0 + j0, BLOCK_N, BLOCK_D, UPCAST)
                v = _load_box(d_v, i_batch, i_kv, k0 + j0, BLOCK_N, BLOCK_D, UPCAST)
            else:
                j0, o_n = _full_keys(steps, rule, t, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
                k = _load(p_k + j0.to(tl.int64) * stride_ks, o_n * stride_ks, 0, D, BLOCK_D, False, UPCAST)
                v = _load(p_v + j0.to(tl.int64) * stride_vs, o_n * stride_vs, 0, D, BLOCK_D, False, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                s = cap_out * _tanh(s * cap_in)
            if HAS_BIAS:
                o_b = tl.arange(0, BLOCK_N) if TMA else o_n
                b = tl.load(p_bias + j0 + o_b, k0 + j0 + o_b < S, 0.0)[None, :] * 1.4426950408889634
                s = s + b if HAS_SOFTCAP else s * qk_scale + b
            if FOLD:  # noqa: SIM102 (decided when compiled)
                if t < diagonal:
                    j = j0 + tl.arange(0, BLOCK_N)
                    keep = _keep(rule, i_m[:, None], j[None, :], lo_m[:, None], BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
                    s = tl.where(keep, s, float("-inf"))
            if RUNNING:
                top_new = tl.maximum(top, tl.max(s, 1) if SCALED else tl.max(s, 1) * qk_scale)
                alpha = tl.exp2(top - top_new)
                total *= alpha
                acc *= alpha[:, None]
                top = top_new
            # Without a softcap one fused multiply-add a score; the running maximum then needs qk_scale > 0.
            p = tl.exp2(s - top[:, None]) if SCALED else tl.exp2(s * qk_scale - top[:, None])
            total += tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, top


@triton.jit(do_not_specialize=VARYING)
def _fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_bounds,
    p_packs,
    p_bias,
    d_k,
    d_v,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_bias,
    stride_bounds,
    num_segments,
    num_slots,
    num_packs,
    H,
    T,
    S,
    qk_scale,  # scale * log2(e): the softmax is in base 2
    cap_in,  # softcap: scores are cap_out * tanh of (q k^T * cap_in), in base 2
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    FIXED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    found, i_batch, i_pack, q0, k0, first, length, num_keys, i0 = _query_tile(
        p_bounds, stride_bounds, num_segments, num_slots, num_packs, T, S, BLOCK_M, SEGMENTS, GAP
    )
    if not found:
        return
    p_pack = p_packs + i_pack * 10
    first_head, num_heads = tl.load(p_pack), tl.load(p_pack + 1)
    i_kv = tl.load(p_pack + 2).to(tl.int64)
    rule = _rule(p_pack, length, HAS_RATIO)

    o_m = tl.arange(0, PACK * BLOCK_M)
    i_m = i0 + o_m % BLOCK_M
    real = (i_m >= first) & (i_m < length) & (o_m // BLOCK_M < num_heads)
    head_m = (first_head + o_m // BLOCK_M).to(tl.int64)
    row_m = q0 + i_m - first
    o_q = head_m * stride_qh + row_m.to(tl.int64) * stride_qt
    q = _load(p_q + i_batch * stride_qb, o_q, real, D, BLOCK_D, True, UPCAST)
    p_k += i_batch * stride_kb + i_kv * stride_kh + k0.to(tl.int64) * stride_ks
    p_v += i_batch * stride_vb + i_kv * stride_vh + k0.to(tl.int64) * stride_vs

    if HAS_BIAS:
        p_bias += i_batch * stride_bias + i_kv * S + k0

    i_first, i_last = tl.maximum(i0, first), tl.minimum(i0 + BLOCK_M, length) - 1
    steps = _steps(rule, i_first, i_last, num_keys, BLOCK_N, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, GAP)
    fits = 0
    if FIXED:
        own = _load(p_k, i_m.to(tl.int64) * stride_ks, real, D, BLOCK_D, True, UPCAST)
        own = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1)
        top = cap_out * _tanh(own * cap_in) if HAS_SOFTCAP else own * qk_scale
        if HAS_BIAS:
            top += tl.load(p_bias + i_m, real, 0.0) * 1.4426950408889634
        acc, total, top = _walk(
            q, p_k, p_v, d_k, d_v, p_bias, stride_ks, stride_vs, i_batch, i_kv, k0, S, steps, rule, i_m, top,
            qk_scale, cap_in, cap_out, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, SEGMENTS,
            HAS_SINK, HAS_STRIPE, HAS_SOFTCAP, HAS_BIAS, TMA, False, UPCAST,
        )  # fmt: skip
        finite = tl.sum(acc * 0.0, 1) == 0.0
        fits = tl.min(((total < LARGEST) & finite).to(tl.int32), 0)
    else:
        acc = tl.zeros([PACK * BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([PACK * BLOCK_M], tl.float32)
        top = tl.zeros([PACK * BLOCK_M], tl.float32)
    if fits == 0:
        top = tl.full([PACK * BLOCK_M], -1e30, tl.float32)  # finite: -inf - -inf would be NaN
        acc, total, top = _walk(
            q, p_k, p_v, d_k, d_v, p_bias, stride_ks, stride_vs, i_batch, i_kv, k0, S, steps, rule, i_m, top,
            qk_scale, cap_in, cap_out, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, SEGMENTS,
            HAS_SINK, HAS_STRIPE, HAS_SOFTCAP, HAS_BIAS, TMA, True, UPCAST,
        )  # fmt: skip

    if GAP:  # a row may see nothing
        top = tl.where(total > 0, top, float("-inf"))
        total = tl.where(total > 0, total, 1.0)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    o_out = head_m * stride_oh + row_m.to(tl.int64) * stride_ot
    _store(p_out + i_batch * stride_ob, o_out, real, acc / total[:, None], D, BLOCK_D)
    tl.store(p_lse + (i_batch * H + head_m) * T + row_m, lse, real)
