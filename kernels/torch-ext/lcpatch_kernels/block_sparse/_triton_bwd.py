"""Backward kernels: delta, then dq as the forward walks, then dk and dv by column. No atomics: the same bits every run.

With p = softmax(s), s = scale q k^T:  dv = p^T do,  ds = p * (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q,
where delta = rowsum(do * out) - dlse, so that a gradient of the LSE costs nothing more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_common import (
    VARYING,
    _fast_key,
    _find_segment,
    _full_keys,
    _is_far,
    _keep,
    _last_row,
    _lo,
    _load,
    _load_box,
    _masked_keys,
    _rule,
    _steps,
    _store,
    _tanh,
)
from ._triton_fwd import _query_tile


@triton.jit(do_not_specialize=VARYING)
def _delta_kernel(
    p_do,
    p_out,
    p_lse,
    p_dlse,
    p_delta,
    p_lse2,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_line,
    num_lines,
    H,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SHIFTS: tl.constexpr,
):
    num_tiles = tl.cdiv(T, BLOCK_M)
    i_head = (tl.program_id(0) // num_tiles).to(tl.int64)  # over batch and heads
    row = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < T
    i_batch, i_h = i_head // H, i_head % H
    o_t = row.to(tl.int64)
    do = _load(p_do + i_batch * stride_gb + i_h * stride_gh, o_t * stride_gt, real, D, BLOCK_D, True, True)
    out = _load(p_out + i_batch * stride_ob + i_h * stride_oh, o_t * stride_ot, real, D, BLOCK_D, True, True)
    delta = tl.sum(do * out, 1)
    if HAS_DLSE:
        delta -= tl.load(p_dlse + i_head * T + row, real, 0.0)
    lse = tl.load(p_lse + i_head * T + row, real, 0.0) * 1.4426950408889634
    for n in tl.static_range(SHIFTS):
        o_line = (n * num_lines + i_head) * stride_line + row - n
        tl.store(p_delta + o_line, delta, real & (row >= n))
        tl.store(p_lse2 + o_line, lse, real & (row >= n))


@triton.jit
def _probabilities(s, lse, qk_scale, cap_in, cap_out, HAS_SOFTCAP: tl.constexpr):
    """(p, slope): the forward's probabilities from raw scores, and the softcap's derivative."""
    if HAS_SOFTCAP:
        tanh = _tanh(s * cap_in)
        return tl.exp2(cap_out * tanh - lse), 1.0 - tanh * tanh
    else:
        return tl.exp2(s * qk_scale - lse), 1.0


@triton.jit(do_not_specialize=VARYING)
def _bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_dq,
    p_lse,
    p_delta,
    p_bounds,
    p_packs,
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
    stride_gb,
    stride_gh,
    stride_gt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_line,
    stride_bounds,
    num_segments,
    num_slots,
    num_packs,
    H,
    T,
    S,
    scale,
    qk_scale,
    cap_in,
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
    TMA: tl.constexpr,
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
    row_m = (q0 + i_m - first).to(tl.int64)
    q = _load(p_q + i_batch * stride_qb, head_m * stride_qh + row_m * stride_qt, real, D, BLOCK_D, True, UPCAST)
    do = _load(p_do + i_batch * stride_gb, head_m * stride_gh + row_m * stride_gt, real, D, BLOCK_D, True, UPCAST)
    o_lse = (i_batch * H + head_m) * stride_line + row_m
    # An infinite LSE makes every probability of a row that is not there zero.
    lse = tl.load(p_lse + o_lse, real, float("inf"))
    delta = tl.load(p_delta + o_lse, real, 0.0)
    p_k += i_batch * stride_kb + i_kv * stride_kh + k0.to(tl.int64) * stride_ks
    p_v += i_batch * stride_vb + i_kv * stride_vh + k0.to(tl.int64) * stride_vs

    i_first, i_last = tl.maximum(i0, first), tl.minimum(i0 + BLOCK_M, length) - 1
    steps = _steps(rule, i_first, i_last, num_keys, BLOCK_N, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, GAP)
    lo_m = _lo(rule, i_m)
    dq = tl.zeros([PACK * BLOCK_M, BLOCK_D], tl.float32)

    # As in the forward: what the diagonal may do, and why the `if`s.
    FOLD: tl.constexpr = TMA and SEGMENTS == 0
    diagonal = steps[2] if FOLD else 0
    if steps[0] > diagonal:
        for t in range(diagonal, steps[0]):
            j, inside = _masked_keys(steps, rule, t, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
            o_j = j.to(tl.int64)
            k = _load(p_k, o_j * stride_ks, inside, D, BLOCK_D, True, UPCAST)
            v = _load(p_v, o_j * stride_vs, inside, D, BLOCK_D, True, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            p, slope = _probabilities(s, lse[:, None], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            keep = _keep(rule, i_m[:, None], j[None, :], lo_m[:, None], BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
            p = tl.where(keep & inside[None, :], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None]) * slope
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

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
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            p, slope = _probabilities(s, lse[:, None], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            if FOLD:  # noqa: SIM102 (decided when compiled)
                if t < diagonal:
                    j = j0 + tl.arange(0, BLOCK_N)
                    keep = _keep(rule, i_m[:, None], j[None, :], lo_m[:, None], BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
                    p = tl.where(keep, p, 0.0)
            ds = p * (dp - delta[:, None]) * slope
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    o_dq = head_m * stride_dqh + row_m * stride_dqt
    _store(p_dq + i_batch * stride_dqb, o_dq, real, dq * scale, D, BLOCK_D)


@triton.jit
def _row_vector(p, offsets, inside, other, COPIES: tl.constexpr):
    """One value a row, loaded COPIES times over.

    With fewer elements than threads, the compiler takes a load for cheap and repeats it for every element that a thread
    of the matrix product holds: 32 of the 40 copies of a step on sm_90. As many elements as threads are loaded once.
    """
    if COPIES == 1:
        return tl.load(p + offsets, inside, other)
    else:
        o_c = 0 * tl.arange(0, COPIES)[:, None]
        return tl.max(tl.load(p + offsets[None, :] + o_c, inside[None, :], other), 0)


@triton.jit
def _key_tile(
    tile,
    length,
    rule,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    REORDER: tl.constexpr,
):
    """Positions of the keys of `tile`, some of them perhaps beyond the segment.

    With a stripe the blocks go in the order sinks, stripe, others, and tiles take them in that order: the programs with
    most rows start first, and a tile of several blocks holds blocks that the same rows see. Only an order: any rule
    gives a permutation.
    """
    o_n = tl.arange(0, BLOCK_N)
    if not (HAS_STRIPE and REORDER):
        return tile * BLOCK_N + o_n
    if BLOCK_N > BLOCK_SIZE:
        rank = tile * (BLOCK_N // BLOCK_SIZE) + o_n // BLOCK_SIZE
        within = o_n % BLOCK_SIZE
    else:
        rank = tile // (BLOCK_SIZE // BLOCK_N) + tl.zeros_like(o_n)
        within = tile % (BLOCK_SIZE // BLOCK_N) * BLOCK_N + o_n
    # No stripe is a stripe so wide that it starts beyond every segment.
    stride = tl.where(rule[1] > 0, rule[1], 1 << 28)
    residue = tl.where(rule[1] > 0, rule[2], (1 << 28) - 1)
    striped = tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_SIZE) - residue, stride), 0)
    shift = 0
    if HAS_SINK:
        shift = ((rule[0] > 0) & (residue > 0)).to(tl.int32)  # block 0 goes first
    # The others ascend, `stride - 1` of them between two of the stripe; block 0, if it went first, is their number 0.
    u = rank - striped
    gap = u % (stride - 1)
    other = u // (stride - 1) * stride + gap + (gap >= residue).to(tl.int32)
    block = tl.where(rank < striped + shift, residue + (rank - shift) * stride, other)
    block = tl.where(rank < shift, 0, block)
    return block * BLOCK_SIZE + within


@triton.jit
def _columns(
    i_pack,
    d_q,
    d_do,
    d_lse,
    d_delta,
    p_q,
    p_do,
    p_lse,
    p_delta,
    p_packs,
    i_batch,
    up,
    H,
    k,
    v,
    dk,
    dv,
    q0,
    first,
    length,
    num_keys,
    j_n,
    j_first,
    j_last,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_line,
    num_lines,
    qk_scale,
    cap_in,
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    SHIFTS: tl.constexpr,
    COPIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(dk, dv) with what the query heads of one pack add to them: a loop over their tiles of rows, head by head."""
    o_m = tl.arange(0, BLOCK_M)
    p_pack = p_packs + i_pack * 10
    first_head, num_heads = tl.load(p_pack), tl.load(p_pack + 1)
    rule = _rule(p_pack, length, HAS_RATIO)
    row0 = q0 - first  # the row of position 0
    p_qh = p_q + i_batch * stride_qb + first_head.to(tl.int64) * stride_qh + row0.to(tl.int64) * stride_qt
    p_gh = p_do + i_batch * stride_gb + first_head.to(tl.int64) * stride_gh + row0.to(tl.int64) * stride_gt
    i_line = i_batch * H + first_head

    # Rows from `start` on, in tiles: some see not yet every key (the diagonal), then all see all, then only far
    # keys or none. What is left over of the middle ones for a whole tile goes with the last.
    far = _is_far(rule, j_n, BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
    far_any = tl.max((far & (j_n < num_keys)).to(tl.int32), 0) > 0
    far_all = tl.min((far | (j_n >= num_keys)).to(tl.int32), 0) > 0
    start = tl.maximum(j_first, first)
    num_diagonal = tl.cdiv(tl.maximum(j_last - start, 0), BLOCK_M)
    middle = start + num_diagonal * BLOCK_M
    all_until = tl.where(far_all, length, tl.minimum(_last_row(rule, j_first) + 1, length))
    num_full = tl.maximum(all_until - middle, 0) // BLOCK_M
    tail = middle + num_full * BLOCK_M
    any_until = tl.where(far_any, length, tl.minimum(_last_row(rule, j_last) + 1, length))
    num_masked = num_diagonal + tl.cdiv(tl.maximum(any_until - tail, 0), BLOCK_M)

    if num_masked > 0:
        for u in range(num_masked * num_heads):
            h, t = u % num_heads, u // num_heads
            i0 = tl.where(t < num_diagonal, start + t * BLOCK_M, tail + (t - num_diagonal) * BLOCK_M)
            i_m = i0 + o_m
            real = i_m < length
            i0 = i0.to(tl.int64)
            o_q, o_g = h.to(tl.int64) * stride_qh + i0 * stride_qt, h.to(tl.int64) * stride_gh + i0 * stride_gt
            q = _load(p_qh + o_q, o_m * stride_qt, real, D, BLOCK_D, True, UPCAST)
            do = _load(p_gh + o_g, o_m * stride_gt, real, D, BLOCK_D, True, UPCAST)
            o_line = (i_line + h) * stride_line + row0 + i0
            lse = _row_vector(p_lse + o_line, o_m, real, float("inf"), COPIES)
            delta = _row_vector(p_delta + o_line, o_m, real, 0.0, COPIES)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            p, slope = _probabilities(s, lse[None, :], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            lo_m = _lo(rule, i_m)
            keep = _keep(rule, i_m[None, :], j_n[:, None], lo_m[None, :], BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
            p = tl.where(keep, p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    if num_full > 0:
        h = 0 * num_heads
        i0 = tl.where(up, middle, middle + (num_full - 1) * BLOCK_M)
        hop = tl.where(up, BLOCK_M, -BLOCK_M)
        for _ in range(num_full * num_heads):
            if TMA:
                q = _load_box(d_q, i_batch, first_head + h, row0 + i0, BLOCK_M, BLOCK_D, UPCAST)
                do = _load_box(d_do, i_batch, first_head + h, row0 + i0, BLOCK_M, BLOCK_D, UPCAST)
            else:
                o_q = h.to(tl.int64) * stride_qh + i0.to(tl.int64) * stride_qt
                o_g = h.to(tl.int64) * stride_gh + i0.to(tl.int64) * stride_gt
                q = _load(p_qh + o_q, o_m * stride_qt, 0, D, BLOCK_D, False, UPCAST)
                do = _load(p_gh + o_g, o_m * stride_gt, 0, D, BLOCK_D, False, UPCAST)
            if TMA:  # without the shuffles of `_row_vector`, 64 a step
                shift = (row0 + i0) % SHIFTS
                line = (shift * num_lines + i_line + h).to(tl.int32)
                lse = d_lse.load([line, row0 + i0 - shift]).reshape(BLOCK_M)
                delta = d_delta.load([line, row0 + i0 - shift]).reshape(BLOCK_M)
            else:
                o_line = (i_line + h) * stride_line + row0 + i0
                lse = _row_vector(p_lse + o_line, o_m, o_m >= 0, 0.0, COPIES)
                delta = _row_vector(p_delta + o_line, o_m, o_m >= 0, 0.0, COPIES)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            p, slope = _probabilities(s, lse[None, :], qk_scale, cap_in, cap_out, HAS_SOFTCAP)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            h += 1
            i0 = tl.where(h == num_heads, i0 + hop, i0)
            h = tl.where(h == num_heads, 0, h)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def _bwd_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_dk,
    p_dv,
    p_lse,
    p_delta,
    p_bounds,
    p_packs,
    p_starts,
    d_q,
    d_do,
    d_lse,
    d_delta,
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
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_line,
    num_lines,
    stride_bounds,
    num_segments,
    num_slots,
    num_kv_heads,
    num_long,
    team,
    H,
    T,
    S,
    scale,
    qk_scale,
    cap_in,
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    UNIFORM: tl.constexpr,
    REORDER: tl.constexpr,
    SHIFTS: tl.constexpr,
    COPIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    UNIT: tl.constexpr = BLOCK_SIZE if HAS_STRIPE and BLOCK_SIZE > BLOCK_N else BLOCK_N
    # A row is a KV head of a batch row. The first `num_long` tiles of each, the stripe's, go first, `team` rows
    # at a time: as many as run at once. A team starts together at the segment's end and walks down, so its programs
    # share rows in L2. They end one by one, shortest first, and the next team's take their places, longest first: had
    # those walked down too, each would read rows of its own; walking up, all of them meet. So teams take turns.
    num_rows = tl.num_programs(0) // num_slots
    pid = tl.program_id(0)
    is_long = pid < num_long * num_rows
    team_size = tl.maximum(num_long * team, 1)
    i_team, within = pid // team_size, pid % team_size
    rest = pid - num_long * num_rows
    slot = tl.where(is_long, within // team, num_long + rest // num_rows)
    i_row = tl.where(is_long, i_team * team + within % team, rest % num_rows)
    up = is_long & (i_team % 2 == 1)
    i_batch, i_kv = (i_row // num_kv_heads).to(tl.int64), (i_row % num_kv_heads).to(tl.int64)
    if SEGMENTS:
        p_row = p_bounds + i_batch * stride_bounds
        unit = slot // (UNIT // BLOCK_N)
        found, q0, k0, first, length, num_keys, unit = _find_segment(
            p_row, num_segments, unit, UNIT, SEGMENTS, GAP, True
        )
        tile = unit * (UNIT // BLOCK_N) + slot % (UNIT // BLOCK_N)
    else:
        found, q0, k0, length, tile = slot >= 0, 0 * slot, 0 * slot, S + 0 * slot, slot
        num_keys = length
        first = length - T
    pack_start, pack_end = tl.load(p_starts + i_kv), tl.load(p_starts + i_kv + 1)
    rule = _rule(p_packs + pack_start * 10, length, HAS_RATIO)
    j_n = _key_tile(tile, num_keys, rule, BLOCK_N, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, REORDER)
    j_first = tl.min(j_n, 0)
    if (not found) | (j_first >= num_keys):
        return

    o_k = (k0 + j_n).to(tl.int64)
    k = _load(p_k + i_batch * stride_kb + i_kv * stride_kh, o_k * stride_ks, j_n < num_keys, D, BLOCK_D, True, UPCAST)
    v = _load(p_v + i_batch * stride_vb + i_kv * stride_vh, o_k * stride_vs, j_n < num_keys, D, BLOCK_D, True, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    j_last = tl.max(tl.where(j_n < num_keys, j_n, 0), 0)

    if UNIFORM:  # one pack: without the loop around, more stays in registers
        i_pack = pack_start
        dk, dv = _columns(
            i_pack, d_q, d_do, d_lse, d_delta, p_q, p_do, p_lse, p_delta, p_packs, i_batch, up, H, k, v, dk, dv,
            q0, first, length, num_keys, j_n, j_first, j_last,
            stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
            stride_line, num_lines, qk_scale, cap_in, cap_out,
            D, BLOCK_D, BLOCK_M, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, HAS_RATIO, HAS_SOFTCAP,
            TMA, SHIFTS, COPIES, UPCAST,
        )  # fmt: skip
    else:
        for i_pack in range(pack_start, pack_end):
            dk, dv = _columns(
                i_pack, d_q, d_do, d_lse, d_delta, p_q, p_do, p_lse, p_delta, p_packs, i_batch, up, H, k, v, dk, dv,
                q0, first, length, num_keys, j_n, j_first, j_last,
                stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
                stride_line, num_lines, qk_scale, cap_in, cap_out,
                D, BLOCK_D, BLOCK_M, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, HAS_RATIO, HAS_SOFTCAP,
                TMA, SHIFTS, COPIES, UPCAST,
            )  # fmt: skip

    o_dk = o_k * stride_dks
    base = i_batch * stride_dkb + i_kv * stride_dkh
    _store(p_dk + base, o_dk, j_n < num_keys, dk * scale, D, BLOCK_D)
    _store(p_dv + base, o_dk, j_n < num_keys, dv, D, BLOCK_D)
