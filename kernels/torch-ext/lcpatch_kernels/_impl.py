"""Which implementation runs: the choice of every op that has a reference and one Triton kernel."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from .block_sparse import TRITON_DTYPES, TRITON_MAX_HEAD_DIM, has_triton, interpreting

Impl = Literal["auto", "triton", "reference"]


def choose(impl: str, x: Tensor, problem: str | None = None) -> str:
    """The implementation that `impl` means for an input [..., D] like `x`.

    Args:
        problem: what else the kernel cannot run of this call; None: nothing.

    Raises:
        ValueError: an unknown `impl`, or "triton" where it cannot run this input.
        ImportError: "triton" where triton is not installed.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, get_args(Impl)))}")
    fits = x.dtype in TRITON_DTYPES and x.shape[-1] <= TRITON_MAX_HEAD_DIM and problem is None
    if impl == "auto":
        return "triton" if x.is_cuda and has_triton() and fits else "reference"
    if impl == "triton":
        if not has_triton():
            raise ImportError("impl='triton' needs triton, which is not installed: pip install triton")
        if not (x.is_cuda or interpreting()) or not fits:
            what = f"{x.dtype} with head dim {x.shape[-1]} on {x.device.type}"
            raise ValueError(f"impl='triton' cannot run {problem or what}; use impl='auto'")
    return impl
