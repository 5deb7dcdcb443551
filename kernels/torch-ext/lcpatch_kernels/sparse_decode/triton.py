"""Split-K decode in Triton: the query heads of a pack share a tile, a row's keys are split over several programs.

A decode step moves bytes: each key and value that counts is read once. A few rows alone would leave most of the chip
idle, so a row is cut into `splits` parts, each with its own online softmax, and a second small kernel merges them by
their LSEs. How many keys a row has is read on the device, how many parts it is cut into follows from shapes alone: a
CUDA graph replays at any length.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse._triton_common import (
    INTERPRETED,
    LOG2E,
    _full_keys,
    _is_far,
    _lo,
    _load,
    _masked_keys,
    _rule,
    _steps,
    _store,
    _tanh,
    pack_table,
)
from ..block_sparse.spec import DENSE, BlockSparseSpec

BLOCK_N = 64  # keys of a tile, up to 256 bytes each; fewer of wider ones, so that three tiles fit 99 KiB (sm_86)
PROGRAMS_PER_SM = 4  # enough loads in flight to fill the memory pipe, few enough that merging costs nothing
MAX_SPLITS = 64


def forward(
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
    scale: float,
    softcap: float,
    return_scores: bool = False,
    splits: int | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.forward`; `splits`, `num_warps` and `num_stages` are for the tuner."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bounds, slots, num_keys, bias, k_scale, v_scale = (
        None if x is None else x.contiguous() for x in (bounds, slots, num_keys, bias, k_scale, v_scale)
    )
    batch, heads, _, head_dim = q.shape
    num_kv_heads, size = k.shape[1:3]
    pattern = spec if spec is not None else BlockSparseSpec.of([DENSE] * heads)
    pack = max(16, triton.next_power_of_2(max(p.num_heads for p in pattern.packs(num_kv_heads))))
    table = pack_table(pattern, num_kv_heads, pack, q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    most_keys = _most_keys(pattern, size) if slots is None else slots.shape[2] * page_size
    block_n = tile_keys(block_d, k.element_size())
    splits = splits or _splits(batch * table.num_packs, most_keys, q)
    out = q.new_empty(batch, 1, heads, head_dim).transpose(1, 2)
    lse = torch.empty((batch, heads, 1), dtype=torch.float32, device=q.device)
    part_out = torch.empty((splits, batch, heads, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((splits, batch, heads), dtype=torch.float32, device=q.device)
    dense = slots is None and all(rule == DENSE for rule in pattern.rules)
    scores = None
    if return_scores:  # elsewhere -inf, which for one run of keys the kernel writes itself: a launch less
        shape = (batch, heads, size)
        scores = q.new_empty(shape, dtype=torch.float32) if dense else torch.full(shape, -torch.inf, device=q.device)
    with torch.cuda.device_of(q):
        _decode_kernel[(splits, table.num_packs, batch)](
            q, k, v, part_out, part_lse, scores, table.packs, bounds, slots, num_keys, bias, k_scale, v_scale,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            num_kv_heads, heads, size, 0 if slots is None else slots.shape[2], batch,
            scale * LOG2E, 2 * LOG2E * scale / softcap if softcap else 0.0, softcap * LOG2E,
            D=head_dim, BLOCK_D=block_d, PACK=pack, BLOCK_N=block_n, PAGE=page_size,
            BLOCK_SIZE=pattern.block_size if table.flags["HAS_STRIPE"] else 1,
            FILLS=dense and return_scores, HAS_SOFTCAP=softcap != 0, UPCAST=INTERPRETED and q.dtype != torch.float32,
            num_warps=num_warps, num_stages=num_stages, **table.flags,
        )  # fmt: skip
        _merge_kernel[(heads, batch)](
            part_out, part_lse, out, lse, batch, heads, *out.stride()[:2],
            D=head_dim, BLOCK_D=block_d, SPLITS=splits, num_warps=4,
        )  # fmt: skip
    return out, lse, scores


@triton.jit
def _absorb(
    state,
    q,
    p_k,
    p_v,
    j,
    inside,
    p_bias,
    p_k_scale,
    p_v_scale,
    p_scores,
    real,
    stride_k,
    stride_v,
    scales,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take the keys `j` into the online softmax (acc, total, top) of the pack's `real` heads; base-2 scores."""
    acc, total, top = state
    o_j = j.to(tl.int64)
    k = _load(p_k, o_j * stride_k, inside, D, BLOCK_D, MASKED, UPCAST)
    v = _load(p_v, o_j * stride_v, inside, D, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if p_k_scale is not None:
        s *= tl.load(p_k_scale + o_j, inside, 0.0)[None, :].to(tl.float32)
    s = scales[2] * _tanh(s * scales[1]) if HAS_SOFTCAP else s * scales[0]
    if p_bias is not None:
        s += tl.load(p_bias + o_j, inside, 0.0)[None, :] * 1.4426950408889634
    if p_scores is not None:
        tl.store(p_scores[:, None] + o_j[None, :], s * 0.6931471805599453, real[:, None] & inside[None, :])
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    top_new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(top_new == float("-inf"), 0.0, top_new)  # no key yet: -inf - -inf would be NaN
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(top - base)
    total = total * alpha + tl.sum(p, 1)
    if p_v_scale is not None:
        p *= tl.load(p_v_scale + o_j, inside, 0.0)[None, :].to(tl.float32)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision="ieee")
    return acc, total, top_new


@triton.jit(do_not_specialize=["num_kv_heads", "H", "S", "num_slots", "B"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_part_out,
    p_part_lse,
    p_scores,
    p_packs,
    p_bounds,
    p_slots,
    p_num_keys,
    p_bias,
    p_k_scale,
    p_v_scale,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    num_kv_heads,
    H,
    S,
    num_slots,
    B,
    qk_scale,
    cap_in,
    cap_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    FILLS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_split, i_pack, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_pack = p_packs + i_pack * 10
    first_head, num_heads = tl.load(p_pack), tl.load(p_pack + 1)
    i_kv = tl.load(p_pack + 2).to(tl.int64)
    o_h = tl.arange(0, PACK)
    real = o_h < num_heads
    head = first_head + o_h
    q = _load(p_q + i_batch * stride_qb, head.to(tl.int64) * stride_qh, real, D, BLOCK_D, True, UPCAST)

    k0, k1 = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + S
    if p_bounds is not None:
        k0, k1 = tl.load(p_bounds + 2 * i_batch), tl.load(p_bounds + 2 * i_batch + 1)
    row = (i_batch * num_kv_heads + i_kv) * S + k0  # of the per-key vectors
    p_k += i_batch * stride_kb + i_kv * stride_kh + k0.to(tl.int64) * stride_ks
    p_v += i_batch * stride_vb + i_kv * stride_vh + k0.to(tl.int64) * stride_vs
    b_bias = p_bias if p_bias is None else p_bias + row
    b_k_scale = p_k_scale if p_k_scale is None else p_k_scale + row
    b_v_scale = p_v_scale if p_v_scale is None else p_v_scale + row
    b_scores = p_scores if p_scores is None else p_scores + (i_batch * H + head) * S + k0
    scales = (qk_scale, cap_in, cap_out)
    acc = tl.zeros([PACK, BLOCK_D], tl.float32)
    total = tl.zeros([PACK], tl.float32)
    top = tl.full([PACK], float("-inf"), tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    if FILLS:
        for j0 in range(i_split * BLOCK_N, S, tl.num_programs(0) * BLOCK_N):
            j = j0 + o_n
            outside = (j < S) & ((j < k0) | (j >= k1))
            p_out = b_scores[:, None] + (j - k0)[None, :]
            tl.store(p_out, tl.full([PACK, BLOCK_N], float("-inf"), tl.float32), real[:, None] & outside[None, :])

    if p_slots is not None:
        p_list = p_slots + (i_batch * num_kv_heads + i_kv) * num_slots
        count = tl.full([], 0, tl.int32) + num_slots * PAGE
        if p_num_keys is not None:
            count = tl.minimum(count, tl.load(p_num_keys + i_batch * num_kv_heads + i_kv))
        begin, end = _part(tl.cdiv(count, BLOCK_N), i_split)
        for t in range(begin, end):
            n = t * BLOCK_N + o_n
            page = tl.load(p_list + n // PAGE, n < count, -1)
            inside = (n < count) & (page >= 0)
            acc, total, top = _absorb(
                (acc, total, top), q, p_k, p_v, page * PAGE + n % PAGE, inside, b_bias, b_k_scale, b_v_scale,
                b_scores, real, stride_ks, stride_vs, scales, D, BLOCK_D, True, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
    else:
        length = tl.maximum(k1 - k0, 0)
        rule = _rule(p_pack, length, HAS_RATIO)
        i = length - 1
        steps = _steps(rule, i, i, length, BLOCK_N, BLOCK_SIZE, HAS_SINK, HAS_STRIPE, False)
        lo = _lo(rule, i)
        begin, end = _part(tl.where(length > 0, steps[0] + steps[1], 0), i_split)
        for t in range(begin, tl.minimum(end, steps[1])):
            j0, o_j = _full_keys(steps, rule, t, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
            acc, total, top = _absorb(
                (acc, total, top), q, p_k, p_v, j0 + o_j, o_n >= 0, b_bias, b_k_scale, b_v_scale,
                b_scores, real, stride_ks, stride_vs, scales, D, BLOCK_D, False, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
        for t in range(tl.maximum(begin, steps[1]) - steps[1], end - steps[1]):
            j, inside = _masked_keys(steps, rule, t, BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
            lowest = tl.where(_is_far(rule, j, BLOCK_SIZE, HAS_SINK, HAS_STRIPE), 0, lo)
            inside = inside & (j <= i) & (j >= lowest)
            acc, total, top = _absorb(
                (acc, total, top), q, p_k, p_v, j, inside, b_bias, b_k_scale, b_v_scale,
                b_scores, real, stride_ks, stride_vs, scales, D, BLOCK_D, True, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip

    part = (i_split.to(tl.int64) * B + i_batch) * H + head
    _store(p_part_out, part * D, real, acc / tl.where(total > 0, total, 1.0)[:, None], D, BLOCK_D)
    tl.store(p_part_lse + part, top + tl.log2(total), real)


@triton.jit
def _part(steps, i_split):
    """The steps [begin, end) of split `i_split`."""
    each = tl.cdiv(steps, tl.num_programs(0))
    return tl.minimum(i_split * each, steps), tl.minimum((i_split + 1) * each, steps)


@triton.jit(do_not_specialize=["B", "H"])
def _merge_kernel(
    p_part_out,
    p_part_lse,
    p_out,
    p_lse,
    B,
    H,
    stride_ob,
    stride_oh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One (row, head): out = sum of the parts' outs, each weighted by its share of the probability."""
    i_head, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s, o_d = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, BLOCK_D)
    part = (o_s * B + i_batch) * H + i_head
    lse = tl.load(p_part_lse + part)
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    x = tl.load(p_part_out + part[:, None] * D + o_d[None, :], (o_s[:, None] >= 0) & (o_d[None, :] < D), 0.0)
    out = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_out + i_batch * stride_ob + i_head * stride_oh + o_d, out.to(p_out.dtype.element_ty), o_d < D)
    tl.store(p_lse + i_batch * H + i_head, (top + tl.log2(total)) * 0.6931471805599453)


def tile_keys(block_d: int, num_bytes: int) -> int:
    """Keys of a tile whose rows are `block_d` elements of `num_bytes`."""
    return min(BLOCK_N, max(16, BLOCK_N * 256 // (block_d * num_bytes)))


@lru_cache(maxsize=64)
def _most_keys(spec: BlockSparseSpec, size: int) -> int:
    """An upper estimate of the keys that a row of `size` tokens attends to, for the number of splits."""
    most = 0
    for rule in spec.rules:
        interval = rule.resolve(size)[0] + rule.back
        stripe = size // rule.stride if rule.stride else 0
        most = max(most, min(size, rule.sinks + stripe + interval))
    return most


def _splits(num_programs: int, most_keys: int, q: Tensor) -> int:
    wanted = PROGRAMS_PER_SM * (_num_sms(q.device) if q.is_cuda else 1) // max(num_programs, 1)
    return triton.next_power_of_2(max(1, min(wanted, triton.cdiv(most_keys, 2 * BLOCK_N), MAX_SPLITS)))


@lru_cache(maxsize=16)
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
