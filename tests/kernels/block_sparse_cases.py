"""Rules and bounds that the interpreter's and the GPU's tests of `block_sparse` share."""

from __future__ import annotations

from fractions import Fraction

import torch
from budget import Problem

from lcpatch_kernels.block_sparse import DENSE, BlockSparseSpec, Rule

# What a query head's rule is, from its index h, its KV head g and the block size b. One entry a kind of pattern.
KINDS = {
    "dense": lambda h, g, b: DENSE,
    "s2": lambda h, g, b: Rule(sinks=b, stride=4, residue=-g % 4, group=b, back=2 * b),
    "s2_without_sinks": lambda h, g, b: Rule(stride=3, residue=(g + 1) % 3, group=b, back=b),
    "s2_odd_sinks": lambda h, g, b: Rule(sinks=b + 5, stride=3, residue=g % 3, group=b, back=b),
    "s2_token_window": lambda h, g, b: Rule(sinks=3, stride=5, residue=g % 5, group=1, back=b + 7),
    "s2_per_head": lambda h, g, b: Rule(sinks=b, stride=4, residue=h % 4, group=b, back=b),
    "stripe_only": lambda h, g, b: Rule(stride=2, residue=g % 2, group=1, back=0),
    "every_block": lambda h, g, b: Rule(stride=1, group=1, back=0),
    "window": lambda h, g, b: Rule(sinks=4, group=1, back=b + 9),
    "many_sinks": lambda h, g, b: Rule(sinks=70, group=1, back=b),
    "sf": lambda h, g, b: Rule(sinks=5 if h % 4 else 20, group=b + 8, shifted=h % 4 == 3, back=0),
    "group": lambda h, g, b: Rule(group=3 * b // 2, back=0, shifted=bool(h % 2)),
    "share": lambda h, g, b: Rule(sinks=2, group=Fraction(1, 3), back=0, shifted=bool(g % 2)),
    "whole_share": lambda h, g, b: Rule(group=Fraction(1, 1), back=0, shifted=True),
    "mixed": lambda h, g, b: [
        DENSE,
        Rule(sinks=b, stride=3, residue=2, group=b, back=b),
        Rule(sinks=5, group=Fraction(1, 4), shifted=True, back=3),
        Rule(group=1, back=11),
    ][h // 2 % 4],
}


def make_spec(kind: str, heads: int, kv_heads: int, block_size: int) -> BlockSparseSpec:
    rules = [KINDS[kind](h, h * kv_heads // heads, block_size) for h in range(heads)]
    return BlockSparseSpec.of(rules, block_size)


def make_problem(
    spec: BlockSparseSpec,
    kv_heads: int,
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    head_dim: int = 32,
    bounds: list | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Random inputs of standard deviation 1.5 in the layout that Hugging Face hands over: [B, T, H, D] transposed."""
    rng = torch.Generator(device).manual_seed(seed)

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, heads, head_dim, generator=rng, device=device) * 1.5
        return x.to(dtype).transpose(1, 2)

    heads, keys = spec.num_heads, keys or queries
    bounds_ = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    grad_lse = torch.randn(batch, heads, queries, generator=rng, device=device)
    q, k, v, do = tensor(heads, queries), tensor(kv_heads, keys), tensor(kv_heads, keys), tensor(heads, queries)
    return Problem(spec, q, k, v, do, grad_lse, bounds_, None, softcap)


def poison_outside(problem: Problem) -> Problem:
    """NaN in every key that no segment holds: a kernel that reads one shows it (0 * NaN is NaN)."""
    for b, row in enumerate(problem.bounds.expand(problem.q.shape[0], -1, -1).tolist()):
        outside = torch.ones(problem.k.shape[2], dtype=torch.bool)
        for q0, q1, k0, k1, *_ in row:
            if q1 > q0:
                outside[k0:k1] = False
        problem.k[b, :, outside.to(problem.k.device)] = torch.nan
        problem.v[b, :, outside.to(problem.v.device)] = torch.nan
    return problem
