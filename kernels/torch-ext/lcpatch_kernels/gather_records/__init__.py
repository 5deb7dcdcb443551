"""`gather_records`: records that lie in host memory, brought to the GPU by the GPU: no copy on the host, no wait."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .._check import check_tensor
from .._impl import Impl
from ..block_sparse import has_triton, interpreting

__all__ = ["block_table", "gather_records"]


def block_table(blocks: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """int64 [2, blocks]: the number of each block's first record, and where in memory it lies."""
    starts = accumulate((len(x) for x in blocks[:-1]), initial=0)
    return torch.tensor([list(starts), [x.data_ptr() for x in blocks]], dtype=torch.int64, device=device)


def gather_records(blocks: Sequence[Tensor], table: Tensor, numbers: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Records by their number. No operator of torch.library: how many are wanted depends on data, so nothing compiles.

    Page-locked memory has an address that a GPU reads by itself, over the bus, at nearly the speed of a copy. The
    blocks must live until its stream is there.

    Args:
        blocks: uint8 [n, bytes] each, contiguous, on the host; page-locked for a GPU. Bytes: a multiple of 8. Records
            are numbered through all blocks. At least one.
        table: `block_table` of these, on the device of `numbers`.
        numbers: int64 [n]; of records that there are, which is not checked on a GPU.
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        uint8 [n, bytes] on the device of `numbers`.

    Raises:
        ValueError: shapes or dtypes that do not fit, blocks that a GPU cannot read, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    check_tensor("table", table, (2, len(blocks)), torch.int64, numbers.device)
    check_tensor("numbers", numbers, (None,), torch.int64, numbers.device)
    record = blocks[0].shape[1]
    if record % 8:
        raise ValueError(f"a record has {record} bytes, which must be a multiple of 8")
    if impl == "auto":
        impl = "triton" if numbers.is_cuda and has_triton() else "reference"
    if impl == "reference":
        from .reference import gather

        return gather(blocks, table, numbers)
    if impl != "triton":
        raise ValueError(f"impl={impl!r} is not one of 'auto', 'triton', 'reference'")
    if not has_triton():
        raise ImportError("impl='triton' needs triton, which is not installed: pip install triton")
    if not (numbers.is_cuda or interpreting()):
        raise ValueError(f"impl='triton' cannot run on {numbers.device.type}; use impl='auto'")
    if numbers.is_cuda and not blocks[-1].is_pinned():  # one stands for all: asking takes a call of the driver
        raise ValueError("a GPU reads page-locked memory only: torch.empty(..., pin_memory=True)")
    from .triton import gather  # imported on first use: the package must import without triton

    return gather(table, numbers, record)
