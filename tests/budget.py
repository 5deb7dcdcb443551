"""How wrong an implementation may be: judged by what the same arithmetic loses, never by a number typed in.

`exact` is the dense oracle in float64. `same_dtype` is dense attention that rounds where a kernel in that dtype must:
the operands of every matrix product, and the results. An implementation passes when its largest error is at most twice
that of `same_dtype`, plus a few units in the last place of the largest value (its sums run in another order).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lcpatch_kernels.block_sparse import BlockSparseSpec, block_sparse, dense

ULPS = 4
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Problem:
    """Inputs of attention and the gradients of its two results."""

    spec: BlockSparseSpec
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    bounds: Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out")})


@dataclass(frozen=True)
class Results:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run(problem: Problem, impl: str, spec: BlockSparseSpec | None = None) -> Results:
    """Forward and backward of `impl`; `spec` replaces the problem's (for negative controls)."""
    x = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    options = {"bounds": problem.bounds, "scale": problem.scale, "softcap": problem.softcap, "impl": impl}
    out, lse = block_sparse(*x, spec or problem.spec, **options)
    grad_lse = problem.grad_lse.to(lse.dtype).masked_fill(lse.detach().isinf(), 0)
    return Results(out.detach(), lse.detach(), *torch.autograd.grad((out, lse), x, (problem.grad_out, grad_lse)))


def exact(problem: Problem) -> Results:
    return run(problem.to(torch.float64), "sdpa")


def same_dtype(problem: Problem) -> Results:
    """Dense attention in the problem's dtype: fp32 sums, probabilities and their gradients rounded before a product."""
    q, k, v, do = (t.float() for t in (problem.q, problem.k, problem.v, problem.grad_out))
    dtype, scale, cap = problem.q.dtype, problem.scale or q.shape[-1] ** -0.5, problem.softcap
    heads, kv_heads = q.shape[1], k.shape[1]
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    index = (torch.arange(n, device=q.device) for n in (*q.shape[:3], k.shape[2]))
    keep = dense.mask_mod(problem.spec, problem.bounds, q.shape[2], k.shape[2], q.device)
    keep = keep(*torch.meshgrid(*index, indexing="ij"))
    s = q @ k.mT * scale
    slope = 1 - (s / cap).tanh() ** 2 if cap else 1
    s = (cap * (s / cap).tanh() if cap else s).masked_fill(~keep, -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.exp2(s * LOG2E - lse[..., None] * LOG2E).masked_fill(~keep, 0)  # base 2, which rounds large scores more
    out = rounded(rounded(p) @ v)
    delta = (out * do).sum(-1) - problem.grad_lse.masked_fill(lse.isinf(), 0)
    ds = rounded(p * (do @ v.mT - delta[..., None]) * slope)
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (ds.mT @ q * scale, rounded(p).mT @ do))
    return Results(out, lse, *(rounded(x) for x in (ds @ k * scale, dk, dv)))


def assert_within(got: Results, problem: Problem, want: Results | None = None) -> None:
    """Every result of `got` within its budget, naming all that are not."""
    want, like = want or exact(problem), same_dtype(problem)
    failures = []
    for field in fields(Results):
        g, w, x = (getattr(r, field.name).double() for r in (got, want, like))
        empty = w.isinf()  # rows in no segment: -inf is exact
        g, w, x = (t.masked_fill(empty & t.isinf(), 0) for t in (g, w, x))
        eps = torch.finfo(getattr(got, field.name).dtype).eps
        budget = 2 * (x - w).abs().amax() + ULPS * eps * w.abs().amax()
        error = (g - w).abs().amax()
        if not error <= budget:  # NaN fails
            failures.append(f"{field.name}: error {error:.2e}, budget {budget:.2e}")
    assert not failures, "; ".join(failures)
