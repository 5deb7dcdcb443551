"""Inputs of `page_bounds` and `page_scores` that the interpreter's and the GPU's tests share, and their judge."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpatch_kernels import page_bounds, page_scores


def make_keys(
    size: int = 203,
    *,
    heads: int = 6,
    kv_heads: int = 3,
    batch: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(q [B, H, 1, D], k [B, K, S, D])` of standard deviation 1.5, off centre so that means are not small."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k = (
        (torch.randn(batch, h, n, head_dim, generator=rng, device=device, dtype=torch.float64) * 1.5 + 0.4).to(dtype)
        for h, n in ((heads, 1), (kv_heads, size))
    )
    return q, k


def make_bounds(*rows: tuple[int, int], device: str = "cpu") -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def token_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k of every token in float64, [B, H, S]."""
    q = q.double()[:, :, 0].unflatten(1, (k.shape[1], -1))
    return (q @ k.double().mT).flatten(1, 2)


def slack(q: Tensor, k: Tensor) -> float:
    """What a sum of D products rounds: D units in the last place of the largest such sum of absolute values."""
    eps = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    return q.shape[-1] * eps * q.double().abs().sum(-1).max().item() * k.double().abs().max().item()


def assert_pages(q: Tensor, k: Tensor, page_size: int, bounds: Tensor | None, impl: str) -> None:
    """Bounds bit-equal to the reference's; means and scores of float64 within what fp32 sums and storing round."""
    low, high, mean = page_bounds(k, page_size, bounds=bounds, impl=impl)
    exact = page_bounds(k.double(), page_size, bounds=bounds, impl="reference")
    assert torch.equal(low.double(), exact[0])
    assert torch.equal(high.double(), exact[1])
    eps = torch.finfo(k.dtype).eps + page_size * torch.finfo(torch.float32).eps
    assert (mean.double() - exact[2]).abs().max() <= eps * k.double().abs().max()
    for kind, pages in (("upper", (low, high)), ("lower", (low, high)), ("upper", (mean,))):
        got = page_scores(q, *pages, kind=kind, impl=impl).double()
        want = page_scores(q.double(), *(x.double() for x in pages), kind=kind, impl="reference")
        assert torch.equal(got.isinf(), want.isinf())
        assert (got - want).nan_to_num().abs().max() <= slack(q, k)
