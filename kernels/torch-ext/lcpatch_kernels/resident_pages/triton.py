"""A fast tier of pages in Triton: a program finds and gives a group's slots, another reads a piece of a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import RecordLayout

BLOCK = 512  # words of 8 bytes of a program: enough of them are under way to fill the bus


def take(
    pages: Tensor,
    newest: Tensor | None,
    page_in: Tensor,
    used: Tensor,
    slot_of: Tensor,
    clock: Tensor,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.take`."""
    pages = pages.contiguous()
    slots, fresh = torch.empty_like(pages, dtype=torch.int32), torch.empty_like(pages)
    if pages.numel():
        batch, heads, num = pages.shape
        block_s = triton.next_power_of_2(page_in.shape[1])
        with torch.cuda.device_of(pages):
            _take_kernel[(batch * heads,)](
                pages, newest, page_in, used, slot_of, clock, counts, slots, fresh,
                heads, num, page_in.shape[1] - 1, *(x.stride(0) for x in (page_in, used, slot_of)),
                0 if newest is None else newest.stride(0),
                BLOCK_M=triton.next_power_of_2(num), BLOCK_S=block_s, num_warps=min(max(block_s // 256, 4), 16),
            )  # fmt: skip
    return slots, fresh


def bring(fresh: Tensor, slots: Tensor, address: Tensor, data: Tensor, page_size: int, layout: RecordLayout) -> None:
    """As `reference.bring`. Multiplies and adds apart, as torch does: fused, the last bit would differ."""
    if not fresh.numel():
        return
    fresh, slots = fresh.contiguous(), slots.contiguous()
    half, bits = page_size * data.shape[4], layout.bits
    grid = (fresh.shape[2], fresh.shape[0] * fresh.shape[1], triton.cdiv(2 * half * bits, 64 * BLOCK))
    with torch.cuda.device_of(data):
        _bring_kernel[grid](
            fresh, slots, address, data, address.stride(1), address.stride(0), fresh.shape[1], data.stride(2),
            HALF=half, KIND=layout.kind, BITS=bits, SCALES=layout.scales, LOWS=layout.lows,
            GROUP=max(layout.group, 1), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["K", "M", "num_slots", "stride_in", "stride_used", "stride_of", "stride_newest"])
def _take_kernel(
    p_pages,
    p_newest,
    p_page_in,
    p_used,
    p_slot_of,
    p_clock,
    p_counts,
    p_slots,
    p_fresh,
    K,
    M,
    num_slots,
    stride_in,
    stride_used,
    stride_of,
    stride_newest,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    p_page_in += group * stride_in + 1
    p_used += group * stride_used + 1
    p_slot_of += group * stride_of + 1
    o_m = tl.arange(0, BLOCK_M)
    inside = o_m < M
    page = tl.load(p_pages + group * M + o_m, inside, -1)
    wanted = page >= 0
    if p_newest is not None:
        wanted = wanted & (page != tl.load(p_newest + group // K * stride_newest))
    is_open = (page >= 0) & (wanted == 0)
    slot = tl.load(p_slot_of + page, wanted, -1).to(tl.int32)
    missing = wanted & (slot < 0)
    clock = tl.load(p_clock + group) + 1
    tl.store(p_used + slot, tl.zeros([BLOCK_M], tl.int64) + clock, slot >= 0)
    num = tl.sum(missing.to(tl.int32), 0)
    if p_counts is not None:
        tl.atomic_add(p_counts, tl.sum(wanted.to(tl.int64), 0))
        tl.atomic_add(p_counts + 1, num.to(tl.int64))
    tl.debug_barrier()  # all threads have read the clock, and what was found is seen as used
    tl.store(p_clock + group, clock)
    if num > 0:
        o_s = tl.arange(0, BLOCK_S)
        real = o_s < num_slots
        used = tl.minimum(tl.load(p_used + o_s, real, 1 << 40), 1 << 40)  # later than any clock: such never leave
        # One number for when and which, all different; the num-th smallest is found by halving where it may lie.
        key = used * BLOCK_S + o_s
        low, high = tl.min(key, 0), tl.max(tl.where(used < (1 << 40), key, 0), 0)
        while low < high:
            middle = low + (high - low) // 2
            enough = tl.sum((key <= middle).to(tl.int32), 0) >= num
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        leaves = key <= low
        nth = tl.cumsum(leaves.to(tl.int32), 0) - 1
        p_list = p_slots + group * M  # until the slots are known, those that leave
        tl.store(p_list + nth, o_s, leaves)
        old = tl.load(p_page_in + o_s, leaves, -1)
        tl.store(p_slot_of + old, tl.full([BLOCK_S], -1, tl.int64), old >= 0)
        tl.debug_barrier()
        new = tl.load(p_list + tl.cumsum(missing.to(tl.int32), 0) - 1, missing, -1)
        tl.store(p_slot_of + page, new.to(tl.int64), missing)
        tl.store(p_page_in + new, page, missing)
        tl.store(p_used + new, tl.zeros([BLOCK_M], tl.int64) + clock, missing)
        slot = tl.where(missing, new, slot)
        tl.debug_barrier()  # all have read the list before it is overwritten
    tl.store(p_slots + group * M + o_m, tl.where(is_open, num_slots, slot), inside)
    tl.store(p_fresh + group * M + o_m, tl.where(missing, page, -1), inside)


@triton.jit(do_not_specialize=["stride_head", "stride_batch", "K", "stride_half"])
def _bring_kernel(
    p_fresh,
    p_slots,
    p_address,
    p_data,
    stride_head,
    stride_batch,
    K,
    stride_half,
    HALF: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    LOWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Words of 8 bytes cross the bus, each of several elements: reads of single bytes would be a fraction as fast."""
    group = tl.program_id(1).to(tl.int64)
    place = group * tl.num_programs(0) + tl.program_id(0)
    page = tl.load(p_fresh + place)
    if page >= 0:
        slot = tl.load(p_slots + place).to(tl.int64)
        address = tl.load(p_address + group // K * stride_batch + group % K * stride_head + page)
        EACH: tl.constexpr = 64 // BITS
        w = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(address.to(tl.pointer_type(tl.int64)) + w, w * EACH < 2 * HALF, 0)
        o = tl.arange(0, EACH)
        n = w[:, None] * EACH + o[None, :]  # of the element
        inside = n < 2 * HALF
        x = word[:, None] >> (o * BITS).to(tl.int64)[None, :]
        if KIND == "int8":
            x = x.to(tl.int8).to(tl.float32)
        elif KIND == "int4":
            x = (x & 15).to(tl.float32)
        elif KIND == "fp8":  # its exponent and fraction where those of fp32 begin, which counts 120 further
            bits = (x & 127).to(tl.int32) << 20
            x = tl.where((x & 128) != 0, -1.0, 1.0) * (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36)
        elif KIND == "bf16":
            x = x.to(tl.int16).to(tl.bfloat16, bitcast=True)
        elif KIND == "fp16":
            x = x.to(tl.int16).to(tl.float16, bitcast=True)
        else:
            x = x.to(tl.int32).to(tl.float32, bitcast=True)
        if KIND == "int8" or KIND == "int4" or KIND == "fp8":
            x *= tl.load((address + SCALES).to(tl.pointer_type(tl.float32)) + n // GROUP, inside, 0.0)
        if KIND == "int4":
            x += tl.load((address + LOWS).to(tl.pointer_type(tl.float32)) + n // GROUP, inside, 0.0)
        out = group * 2 * stride_half + n // HALF * stride_half + slot * HALF + n % HALF
        tl.store(p_data + out, x.to(p_data.dtype.element_ty), inside)
