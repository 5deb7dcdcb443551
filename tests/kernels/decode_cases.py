"""Inputs of `sparse_decode` that the interpreter's and the GPU's tests share, and how they are judged."""

from __future__ import annotations

from typing import Any

import torch
from block_sparse_cases import make_spec
from torch import Tensor

from lcpatch_kernels import sparse_decode

EMPTY = -1e4  # stands for the lse of a row without keys, so that differences stay finite


def make_inputs(
    kind: str | None = "s2",
    keys: int = 203,
    *,
    heads: int = 6,
    kv_heads: int = 3,
    batch: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `sparse_decode`, tensors of standard deviation 1.5."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        (torch.randn(batch, h, n, head_dim, generator=rng, device=device) * 1.5).to(dtype)
        for h, n in ((heads, 1), (kv_heads, keys), (kv_heads, keys))
    )
    spec = None if kind is None else make_spec(kind, heads, kv_heads, block_size)
    return {"q": q, "k": k, "v": v, "spec": spec, **options}


def quantised(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with keys and values in int8 or float8, one scale a token."""
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    for name in ("k", "v"):
        scale = inputs[name].float().abs().amax(-1) / largest
        scaled = inputs[name].float() / scale[..., None]
        inputs[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        inputs[f"{name}_scale"] = scale
    return inputs


def results(inputs: dict[str, Any], impl: str) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, scores = sparse_decode(**inputs, return_scores=True, impl=impl)
    return out.double(), lse.double().nan_to_num(neginf=EMPTY), scores.double()


def assert_decodes(inputs: dict[str, Any], want: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """The kernel against the reference in float64; the budget is twice what rounding p and out to q's dtype loses.

    Rounding p moves out by at most eps / 2 of sum p |v| <= max |v|, and storing it by as much again; the scores of fp32
    sums carry 4 ulps of the largest one, which move out by that much of max |v|.
    """
    exact = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    if inputs["k"].dtype != inputs["q"].dtype:
        exact["k"], exact["v"] = (exact[n] * exact[f"{n}_scale"][..., None] for n in ("k", "v"))
        exact["k_scale"] = exact["v_scale"] = None
    if exact.get("bias") is not None:
        exact["bias"] = inputs["bias"]
    out, lse, scores = want or results(exact, "reference")
    got_out, got_lse, got_scores = results(inputs, "triton")
    plain_out, plain_lse = sparse_decode(**inputs, impl="triton")
    assert torch.equal(plain_out.double(), got_out)
    assert torch.equal(plain_lse.double().nan_to_num(neginf=EMPTY), got_lse)
    eps, single = torch.finfo(inputs["q"].dtype).eps, torch.finfo(torch.float32).eps
    largest = (exact["q"].norm(dim=-1).max() * exact["k"].norm(dim=-1).max() * exact["q"].shape[-1] ** -0.5).item()
    slack = 4 * single * max(largest, 1.0)
    if inputs["k"].dtype != inputs["q"].dtype:  # k is cast exactly, p times v's scale is rounded before the product
        slack += eps
    assert (got_out - out).abs().max() <= 2 * (eps + slack) * exact["v"].abs().max(), (got_out - out).abs().max()
    assert (got_lse - lse).abs().max() <= 2 * slack * max(1.0, lse.masked_fill(lse == EMPTY, 0).abs().max().item())
    seen = scores.isfinite()
    assert torch.equal(got_scores == -torch.inf, ~seen)
    wrong = (got_scores - scores).masked_fill(~seen, 0).abs().max()
    assert wrong <= 2 * slack * max(1.0, scores.masked_fill(~seen, 0).abs().max().item()), wrong
