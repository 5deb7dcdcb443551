"""Whether what a benchmark would time is right: nothing is timed before it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def out_and_grads(forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative_error(x: Tensor, true: Tensor) -> float:
    """||x - true|| / ||true||; infinite for NaN, which never passes."""
    error = ((x.to(true.dtype) - true).norm() / true.norm()).item()
    return error if error == error else float("inf")


def between_backends(ours: Tensor, other: Tensor, dense: Tensor) -> dict[str, Any]:
    """Whether logits are dense ones, up to what rounding does to them.

    The budget is twice the distance between two dense backends of torch, which round differently too.
    """
    error, budget = ((x - dense).norm().item() / dense.norm().item() for x in (ours, other))
    return {"error": error, "budget": 2 * budget, "passed": error <= 2 * budget}
