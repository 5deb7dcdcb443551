"""What every op asks of the tensors that go beside its queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    name: str, x: Tensor, shape: Sequence[int | None], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Refuse a tensor that is not as it should be; None in `shape`, or for `dtype`, stands for any.

    Raises:
        ValueError: it is not; the message says what was wanted and what came.
    """
    fits = x.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
    if not fits or dtype not in (None, x.dtype) or x.device != device:
        raise ValueError(
            f"{name} must be {list(shape)}{'' if dtype is None else f' in {dtype}'} on {device}; "
            f"got {list(x.shape)} in {x.dtype} on {x.device}"
        )
