"""`block_sparse` with a bias on its keys, judged against dense attention in float64; for the interpreter and a GPU."""

from __future__ import annotations

from typing import Any

import torch
from block_sparse_cases import make_spec
from torch import Tensor

from lcpatch_kernels import block_sparse
from lcpatch_kernels.block_sparse import dense


def make_inputs(
    kind: str,
    queries: int,
    keys: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `block_sparse`; the bias is the log of sizes up to a thousand."""
    rng = torch.Generator(device).manual_seed(0)
    q, k, v = (
        (torch.randn(2, h, n, head_dim, generator=rng, device=device) * 1.5).to(dtype)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    bias = torch.rand(2, kv_heads, keys, generator=rng, device=device) * 7
    return {"q": q, "k": k, "v": v, "spec": make_spec(kind, heads, kv_heads, block_size), "bias": bias, **options}


def oracle(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`(out, lse)` from all scores at once, in float64; rows without keys are 0 and -inf."""
    q, k, v, bias = (inputs[name].double() for name in ("q", "k", "v", "bias"))
    group = q.shape[1] // k.shape[1]
    k, v, bias = (x.repeat_interleave(group, 1) for x in (k, v, bias))
    scores = q @ k.mT * inputs.get("scale", q.shape[-1] ** -0.5)
    if cap := inputs.get("softcap"):
        scores = cap * (scores / cap).tanh()
    index = torch.meshgrid(*(torch.arange(n, device=q.device) for n in scores.shape), indexing="ij")
    keep = dense.mask_mod(inputs["spec"], inputs.get("bounds"), *scores.shape[2:], q.device)(*index)
    scores = (scores + bias[:, :, None]).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


def assert_biased(inputs: dict[str, Any], impl: str, want: tuple[Tensor, Tensor] | None = None) -> None:
    """Budget: p and out are rounded to the dtype, and fp32 sums carry 4 ulps of the largest score, each twice."""
    out, lse = want or oracle(inputs)
    got_out, got_lse = block_sparse(**inputs, impl=impl)
    eps, single = torch.finfo(inputs["q"].dtype).eps, torch.finfo(torch.float32).eps
    q, k = inputs["q"].double(), inputs["k"].double()
    largest = q.norm(dim=-1).max() * k.norm(dim=-1).max() * q.shape[-1] ** -0.5 + inputs["bias"].abs().max()
    slack = 4 * single * largest
    assert (got_out.double() - out).abs().max() <= 2 * (eps + slack) * inputs["v"].abs().max()
    seen = lse.isfinite()
    assert torch.equal(got_lse.isfinite(), seen)
    wrong = (got_lse.double() - lse).masked_fill(~seen, 0).abs().max()
    assert wrong <= 2 * slack
