"""Inputs of `attn_mass` that the interpreter's and the GPU's tests share, and how they are judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcpatch_kernels import DENSE, BlockSparseSpec, attn_mass, block_sparse

ULPS = 4


def make_inputs(
    queries: int = 70,
    keys: int = 203,
    *,
    heads: int = 6,
    kv_heads: int = 3,
    batch: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `attn_mass`, tensors of standard deviation 1.5, the lse that of attention in float64."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k = (
        (torch.randn(batch, h, n, head_dim, generator=rng, device=device) * 1.5).to(dtype)
        for h, n in ((heads, queries), (kv_heads, keys))
    )
    how = {name: options.get(name) for name in ("bounds", "scale", "softcap")}
    spec = BlockSparseSpec.of([DENSE] * heads)
    _, lse = block_sparse(q.double(), k.double(), k.double(), spec, **how, impl="reference")
    return {"q": q, "k": k, "lse": lse if dtype == torch.float64 else lse.float(), **options}


def exact(inputs: dict[str, Any]) -> Tensor:
    """The reference in float64."""
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    return attn_mass(**wide, impl="reference")


def assert_sums(inputs: dict[str, Any], impl: str = "triton", want: Tensor | None = None) -> None:
    """`impl` against the reference in float64: at most twice what the same sums lose in fp32, and a few ulps."""
    right = exact(inputs)
    want = right if want is None else want
    like = attn_mass(**inputs | {"q": inputs["q"].float(), "k": inputs["k"].float()}, impl="reference").double()
    got = attn_mass(**inputs, impl=impl).double()
    eps = torch.finfo(torch.float32).eps
    # A score of size s, rounded, moves its exponential by s eps: base 2 rounds it once more than base e.
    largest = (inputs["q"].double().norm(dim=-1).max() * inputs["k"].double().norm(dim=-1).max()).item()
    slack = ULPS * eps * (1 + largest * (inputs.get("scale") or inputs["q"].shape[-1] ** -0.5))
    budget = 2 * (like - right).abs().max() + slack * right.abs().max()
    error = (got - want).abs().max()
    assert error <= budget, (error, budget)
