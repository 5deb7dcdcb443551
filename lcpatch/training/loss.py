"""The language-modelling loss of many rows, with a few rows' logits in memory at a time.

Logits of a chunk are its largest tensor: 4,096 tokens of a 128K vocabulary take 2.1 GB in fp32, and cross-entropy wants
it thrice. Here each block of rows goes through the head, gives its loss and its gradients, and is forgotten; backward
then only scales. As in Liger's fused linear cross-entropy (arXiv 2410.10989, section 3.2), but for any head: a final
softcap, a logit scale, LoRA on the head, all that the model does behind its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .buffers import exact_gradients

IGNORE = -100
"""The label that counts for nothing, in transformers and in torch."""
BLOCK_LOGITS = 1 << 25
"""Logits at a time: 134 MB in fp32, 256 rows of a 128K vocabulary, enough for a full-speed product."""
CPU_ROWS = 64
"""On a CPU larger blocks cost more in page faults than they save."""


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    parameters: Sequence[Tensor],
    vocab_size: int,
) -> Tensor:
    """Sum over rows of the cross-entropy of `head(hidden)`, differentiable in `hidden` and `parameters`.

    Args:
        head: hidden states [1, n, C] to logits [1, n, V].
        hidden: [B, T, C].
        targets: [B, T], on the host, so that nothing waits for the device; rows with -100 never reach the head.
        parameters: what the head trains.
        vocab_size: V, to size the blocks.

    Returns:
        0-dim, fp32 (float64 for float64 hidden states).
    """
    targets, rows = targets.flatten(), hidden.flatten(0, 1)
    valid = targets != IGNORE
    if not bool(valid.all()):
        rows = rows[valid.nonzero()[:, 0].to(rows.device, non_blocking=True)]
    targets = targets[valid].to(rows.device, non_blocking=True)
    trained = [p for p in parameters if p.requires_grad]
    block = CPU_ROWS if hidden.device.type == "cpu" else max(64, BLOCK_LOGITS // vocab_size // 64 * 64)
    return _Summed.apply(rows, targets, head, block, *trained)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], block: int, *parameters: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        grad_rows = torch.zeros_like(rows) if wanted else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            x = rows[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = _cross_entropy(head(x[None])[0], targets[part])
            total += loss.detach()
            if wanted:
                with exact_gradients(rows.device.type), _without_hooks(parameters):
                    grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
                grad_rows[part] = grads[0]
                for total_grad, grad in zip(sums, grads[1:], strict=True):
                    if grad is not None:
                        total_grad += grad
        ctx.save_for_backward(grad_rows, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_rows, *sums = ctx.saved_tensors
        return grad_rows * grad, None, None, None, *(s * grad for s in sums)


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A parameter's hooks are for the gradient that backward returns, and not for its parts as well."""
    before = [p._backward_hooks for p in parameters]
    try:
        for p in parameters:
            p._backward_hooks = None
        yield
    finally:
        for p, hooks in zip(parameters, before, strict=True):
            p._backward_hooks = hooks


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
