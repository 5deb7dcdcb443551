"""Matching and merging in Triton: one program per chunk and head finds who joins whom, another takes the means.

Matching a chunk is one small matrix product and a few reductions over it, all in registers. Merging reads every key
and value once; the sums over a cluster are a product with a matrix of sizes, zero where a slot does not belong. That
product is in three parts of tf32, together as precise as fp32: sizes beyond 256 are not exact in bf16, and sum n v must
be conserved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse._triton_common import INTERPRETED, _load, _store

BLOCK_N = 32  # slots of a chunk that are read at a time
BLOCK_O = 32  # output slots of a program
MERGE_STAGES = 2  # three of fp32 would not fit the shared memory of sm_86


def match(k: Tensor, size: Tensor, chunk: int, merges: int) -> Tensor:
    """As `reference.match`."""
    k, size = _last_contiguous(k), size.contiguous()
    batch, heads, slots, head_dim = k.shape
    target = torch.empty((batch, heads, slots), dtype=torch.int32, device=k.device)
    half = max(16, triton.next_power_of_2(chunk // 2))
    if target.numel() == 0:
        return target
    with torch.cuda.device_of(k):
        _match_kernel[(triton.cdiv(slots, chunk), heads, batch)](
            k, size, target, *k.stride()[:3], slots, heads, merges, chunk,
            HALF=half, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            UPCAST=INTERPRETED and k.dtype != torch.float32, num_warps=8 if half > 64 else 4,
        )  # fmt: skip
    return target


def merge(
    k: Tensor, v: Tensor, size: Tensor, target: Tensor, num_out: int, chunk: int, merges: int, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.merge`; a chunk's slots go to the chunk's `chunk - merges` output slots."""
    k, v, size, target = _last_contiguous(k), _last_contiguous(v), size.contiguous(), target.contiguous()
    batch, heads, slots, head_dim = k.shape
    k_out, v_out = (x.new_empty(batch, heads, num_out, head_dim) for x in (k, v))
    size_out = size.new_empty(batch, heads, num_out)
    if size_out.numel() == 0:
        return k_out, v_out, size_out
    tiles = triton.cdiv(chunk - merges, BLOCK_O)
    with torch.cuda.device_of(k):
        _merge_kernel[(triton.cdiv(slots, chunk) * tiles, heads, batch)](
            k, v, size, target, k_out, v_out, size_out, *k.stride()[:3], *v.stride()[:3], slots, heads, merges, num_out,
            tiles, chunk, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_N=BLOCK_N, BLOCK_O=BLOCK_O, WEIGHTED=weighted, num_warps=4, num_stages=MERGE_STAGES,
        )  # fmt: skip
    return k_out, v_out, size_out


@triton.jit
def _counts(left, right):
    """How many of a chunk's slots before each a and each b have their flag set: the slots run a0, b0, a1, b1, …"""
    pair = left.to(tl.int32) + right.to(tl.int32)
    before = tl.cumsum(pair, 0) - pair
    return before, before + left.to(tl.int32)


# `chunk` is no constant: behind whole chunks comes one of any size, and each would be compiled anew.
@triton.jit(do_not_specialize=["S", "K", "merges", "chunk"])
def _match_kernel(
    p_k,
    p_size,
    p_target,
    stride_kb,
    stride_kh,
    stride_ks,
    S,
    K,
    merges,
    chunk,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_chunk, i_head, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = i_chunk * chunk
    length = tl.minimum(S - first, chunk)
    gives = merges * length // chunk
    o = tl.arange(0, HALF)
    in_a, in_b = 2 * o < length, 2 * o + 1 < length
    p_k += i_batch * stride_kb + i_head * stride_kh + first.to(tl.int64) * stride_ks
    row = (i_batch * K + i_head) * S + first
    real_a = tl.load(p_size + row + 2 * o, in_a, 0.0) > 0
    real_b = tl.load(p_size + row + 2 * o + 1, in_b, 0.0) > 0

    o_s = o.to(tl.int64) * 2 * stride_ks
    a = _load(p_k, o_s, real_a, D, BLOCK_D, True, UPCAST)
    b = _load(p_k + stride_ks, o_s, real_b, D, BLOCK_D, True, UPCAST)
    cosine = tl.dot(a, tl.trans(b), input_precision="tf32x3")
    a, b = a.to(tl.float32), b.to(tl.float32)
    cosine = cosine / tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12)[:, None]
    cosine = cosine / tl.maximum(tl.sqrt(tl.sum(b * b, 1)), 1e-12)[None, :]
    cosine = tl.where(real_a[:, None] & real_b[None, :], cosine, float("-inf"))
    best = tl.max(cosine, 1)
    partner = tl.min(tl.where(cosine == best[:, None], o[None, :], HALF), 1)  # the first of equals

    pad_a, pad_b = in_a & (real_a == 0), in_b & (real_b == 0)
    before_a, before_b = _counts(pad_a, pad_b)
    gone_a, gone_b = pad_a & (before_a < gives), pad_b & (before_b < gives)
    edges = gives - tl.sum(gone_a.to(tl.int32) + gone_b.to(tl.int32), 0)
    # The rank of an a is how many edges are better, or as good and earlier.
    above = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & (o[None, :] < o[:, None]))
    joins = real_a & (tl.sum((above & in_a[None, :]).to(tl.int32), 1) < edges)

    stays_a, stays_b = in_a & (gone_a == 0) & (joins == 0), in_b & (gone_b == 0)
    place_a, place_b = _counts(stays_a, stays_b)
    joined = tl.sum(tl.where(partner[:, None] == o[None, :], place_b[None, :], 0), 1)
    base = i_chunk * (chunk - merges)
    to_a = tl.where(joins, base + joined, tl.where(stays_a, base + place_a, -1))
    to_b = tl.where(stays_b, base + place_b, -1)
    tl.store(p_target + row + 2 * o, to_a, in_a)
    tl.store(p_target + row + 2 * o + 1, to_b, in_b)


@triton.jit(do_not_specialize=["S", "K", "merges", "num_out", "tiles", "chunk"])
def _merge_kernel(
    p_k,
    p_v,
    p_size,
    p_target,
    p_k_out,
    p_v_out,
    p_size_out,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    S,
    K,
    merges,
    num_out,
    tiles,
    chunk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_chunk, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = i_chunk * chunk
    end = tl.minimum(first + chunk, S)
    o_o = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    out = i_chunk * (chunk - merges) + o_o
    inside = (o_o < chunk - merges) & (out < num_out)
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    row = (i_batch * K + i_head) * S
    k = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
    v = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_O], tl.float32)
    size = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, chunk, BLOCK_N):
        s = first + start + tl.arange(0, BLOCK_N)
        within = (s < end) & (start + tl.arange(0, BLOCK_N) < chunk)
        n = tl.load(p_size + row + s, within, 0.0)
        to = tl.load(p_target + row + s, within, -1)
        n = tl.where(to[None, :] == out[:, None], n[None, :], 0.0)
        weight = n if WEIGHTED else (n > 0).to(tl.float32)
        real = within & (tl.sum(n, 0) > 0)  # of this tile: what is not, is not read
        o_s = s.to(tl.int64)
        k_s = _load(p_k, o_s * stride_ks, real, D, BLOCK_D, True, True)
        v_s = _load(p_v, o_s * stride_vs, real, D, BLOCK_D, True, True)
        k = tl.dot(weight, k_s, k, input_precision="tf32x3")
        v = tl.dot(weight, v_s, v, input_precision="tf32x3")
        total += tl.sum(weight, 1)
        size += tl.sum(n, 1)
    total = tl.where(total > 0, total, 1.0)
    place = (i_batch * K + i_head) * num_out + out
    _store(p_k_out, place * D, inside, k / total[:, None], D, BLOCK_D)
    _store(p_v_out, place * D, inside, v / total[:, None], D, BLOCK_D)
    tl.store(p_size_out + place, size, inside)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
