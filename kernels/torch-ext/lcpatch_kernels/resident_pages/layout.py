"""How a page lies in host memory, as bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

KINDS = {
    "int8": torch.int8,
    "int4": torch.uint8,  # two in a byte, the even one in the low half
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""The numbers that a record may hold, and the dtype in which torch reads them."""


class RecordLayout(NamedTuple):
    """A page [2, page, D] of keys and values: its elements first, in order, then what they are multiplied by, then
    what is added.

    Args:
        kind: of an element, one of `KINDS`.
        nbytes: of a record, a multiple of 8.
        scales, lows: where the fp32 scales and, of "int4", offsets begin; multiples of 8.
        group: elements that share one; 0: there are none.
    """

    kind: str
    nbytes: int
    scales: int = 0
    lows: int = 0
    group: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return KINDS[self.kind]

    @property
    def bits(self) -> int:
        """Of an element."""
        return 4 if self.kind == "int4" else 8 * self.dtype.itemsize
