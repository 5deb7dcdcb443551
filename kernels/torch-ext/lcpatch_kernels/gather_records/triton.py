"""Records by their number in Triton: a program reads a piece of one from the host's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # words of 8 bytes of a program: enough of them are under way to fill the bus


def gather(table: Tensor, numbers: Tensor, record: int) -> Tensor:
    """As `reference.gather`."""
    words = record // 8
    out = torch.empty(len(numbers), words, dtype=torch.int64, device=numbers.device)
    if out.numel():
        with torch.cuda.device_of(numbers):
            _gather_kernel[(len(numbers), triton.cdiv(words, BLOCK))](
                table, numbers, out, table.shape[1], words, BLOCK=BLOCK, num_warps=4
            )
    return out.view(torch.uint8)


@triton.jit(do_not_specialize=["num_blocks"])
def _gather_kernel(p_table, p_numbers, p_out, num_blocks, words, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    number = tl.load(p_numbers + i)
    start, address = tl.load(p_table), tl.load(p_table + num_blocks)
    for index in range(1, num_blocks):
        first = tl.load(p_table + index)
        behind = number >= first
        start = tl.where(behind, first, start)
        address = tl.where(behind, tl.load(p_table + num_blocks + index), address)
    p_record = (address + (number - start) * words * 8).to(tl.pointer_type(tl.int64))
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < words
    tl.store(p_out + i * words + o, tl.load(p_record + o, mask=inside), mask=inside)
