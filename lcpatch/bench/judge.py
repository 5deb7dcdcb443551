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
    """||x - true|| / ||true||; infinite for NaN, so that a maximum sees it."""
    error = ((x.to(true.dtype) - true).norm() / true.norm()).item()
    return error if error == error else float("inf")


def passes(error: float, budget: float) -> bool:
    """Whether an error is within its budget; never where that comes from a result which is NaN itself."""
    return error <= budget < float("inf")


def between_backends(ours: Tensor, other: Tensor, dense: Tensor) -> dict[str, Any]:
    """Whether logits are dense ones, up to what rounding does to them.

    The budget is twice the distance between two dense backends of torch, which round differently too.
    """
    error, budget = relative_error(ours, dense), 2 * relative_error(other, dense)
    return {"error": error, "budget": budget, "passed": passes(error, budget)}
