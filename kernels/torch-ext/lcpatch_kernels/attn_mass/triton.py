"""Column sums of attention in Triton: a program holds a tile of keys and walks the queries that see it.

No atomics and no second pass: a key's sum is one program's, over the query heads of its group one after the other, from
the diagonal down. Scores are held transposed, keys by queries, so that a sum over queries stays within a warp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse._triton_common import INTERPRETED, LOG2E, _load, _tanh

REDUCE = {"sum": 0, "mean": 1, "max": 2}


class Tiles(NamedTuple):
    """Keys that stay, queries that walk past them, warps, and how many tiles of queries are on their way."""

    keys: int
    queries: int
    num_warps: int
    num_stages: int


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    reduce: str,
    tiles: Tiles | None = None,
) -> Tensor:
    """As `reference.forward`; `tiles`: others than `tiles_for` says."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse = lse.float().contiguous()
    bounds = None if bounds is None else bounds.contiguous()
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    one = num_queries == 1  # then the heads of a group are the rows of a tile
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n, block_m, num_warps, num_stages = tiles or tiles_for(q.dtype, block_d)
    if one:
        block_m = max(16, triton.next_power_of_2(heads // kv_heads))
    out = torch.zeros((batch, kv_heads, num_keys), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _mass_kernel[(triton.cdiv(num_keys, block_n), kv_heads, batch)](
            q, k, lse, out, bounds, *q.stride()[:3], *k.stride()[:3],
            num_queries, num_keys, heads, kv_heads,
            scale * LOG2E, 2 * LOG2E * scale / softcap if softcap else 0.0, softcap * LOG2E,
            GROUP=heads // kv_heads, D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
            REDUCE=REDUCE[reduce], ONE=one, HAS_SOFTCAP=softcap != 0,
            UPCAST=INTERPRETED and q.dtype != torch.float32, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


@triton.jit
def _given(
    k,
    p_q,
    p_lse,
    stride_row,
    stride_lse,
    m,
    num_rows,
    i_first,
    j,
    scales,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[N, M]: what each of the query rows m … m + M - 1 gave each key `j`; row 0 has position `i_first`."""
    row = m + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    o_row = row.to(tl.int64)
    q = _load(p_q, o_row * stride_row, inside, D, BLOCK_D, MASKED, UPCAST)
    if MASKED:
        lse = tl.load(p_lse + o_row * stride_lse, inside, float("inf"))
    else:
        lse = tl.load(p_lse + o_row * stride_lse)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634  # who saw nothing gave nothing
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    s = scales[2] * _tanh(s * scales[1]) if HAS_SOFTCAP else s * scales[0]
    p = tl.exp2(s - lse[None, :])
    if MASKED and CAUSAL:
        p = tl.where(j[:, None] <= i_first + row[None, :], p, 0.0)
    return p


@triton.jit(do_not_specialize=["T", "S", "H", "num_kv_heads"])
def _mass_kernel(
    p_q,
    p_k,
    p_lse,
    p_out,
    p_bounds,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_ks,
    T,
    S,
    H,
    num_kv_heads,
    qk_scale,
    cap_in,
    cap_out,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REDUCE: tl.constexpr,
    ONE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_kv, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q0, k0 = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    q1, k1 = q0 + T, k0 + S
    if p_bounds is not None:
        q0, q1 = tl.load(p_bounds + 4 * i_batch), tl.load(p_bounds + 4 * i_batch + 1)
        k0, k1 = tl.load(p_bounds + 4 * i_batch + 2), tl.load(p_bounds + 4 * i_batch + 3)
    num_rows, length = q1 - q0, k1 - k0
    j0 = i_tile * BLOCK_N
    if (j0 < length) & (num_rows > 0):
        j = j0 + tl.arange(0, BLOCK_N)
        p_key = p_k + i_batch * stride_kb + i_kv * stride_kh + k0.to(tl.int64) * stride_ks
        k = _load(p_key, j.to(tl.int64) * stride_ks, j < length, D, BLOCK_D, True, UPCAST)
        scales = (qk_scale, cap_in, cap_out)
        first_head = i_kv * GROUP
        p_query = p_q + i_batch * stride_qb + first_head * stride_qh + q0.to(tl.int64) * stride_qm
        p_row = p_lse + (i_batch * H + first_head) * T + q0
        i_first = length - num_rows
        if ONE:
            p = _given(
                k, p_query, p_row, stride_qh, T, 0, GROUP, i_first, j, scales,
                D, BLOCK_D, BLOCK_M, True, False, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
            mass = tl.max(p, 1) if REDUCE == 2 else tl.sum(p, 1)
        else:
            begin = tl.maximum(j0 - i_first, 0) // BLOCK_M * BLOCK_M
            end = num_rows // BLOCK_M * BLOCK_M
            # From this row on, every row sees the whole tile.
            body = tl.maximum(tl.cdiv(j0 + BLOCK_N - 1 - i_first, BLOCK_M) * BLOCK_M, begin)
            body = tl.minimum(body, tl.maximum(end, begin))
            mass = tl.zeros([BLOCK_N], tl.float32)
            for _ in range(GROUP):
                given = tl.zeros([BLOCK_N], tl.float32)
                for m in range(begin, body, BLOCK_M):
                    p = _given(
                        k, p_query, p_row, stride_qm, 1, m, num_rows, i_first, j, scales,
                        D, BLOCK_D, BLOCK_M, True, True, HAS_SOFTCAP, UPCAST,
                    )  # fmt: skip
                    given += tl.sum(p, 1)
                for m in range(body, end, BLOCK_M):
                    p = _given(
                        k, p_query, p_row, stride_qm, 1, m, num_rows, i_first, j, scales,
                        D, BLOCK_D, BLOCK_M, False, True, HAS_SOFTCAP, UPCAST,
                    )  # fmt: skip
                    given += tl.sum(p, 1)
                for m in range(tl.maximum(body, end), num_rows, BLOCK_M):
                    p = _given(
                        k, p_query, p_row, stride_qm, 1, m, num_rows, i_first, j, scales,
                        D, BLOCK_D, BLOCK_M, True, True, HAS_SOFTCAP, UPCAST,
                    )  # fmt: skip
                    given += tl.sum(p, 1)
                mass = tl.maximum(mass, given) if REDUCE == 2 else mass + given
                p_query += stride_qh
                p_row += T
        if REDUCE == 1:
            mass = mass / GROUP
        tl.store(p_out + (i_batch * num_kv_heads + i_kv) * S + k0 + j, mass, j < length)


def tiles_for(dtype: torch.dtype, block_d: int) -> Tiles:
    """On every GPU from sm_80 on."""
    if dtype == torch.float32 or block_d > 128:
        return Tiles(64, 32, 4, 2)
    # 64 KiB of shared memory at head dim 128, so up to three programs a processor, which meet nowhere: some multiply
    # while others exponentiate. On an H100, 128K tokens: .36 of an FA2 forward; 128 x 128 with 8 warps takes .52.
    return Tiles(128, 64, 4, 2)
