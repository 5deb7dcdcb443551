"""Bounds and scores of pages on a GPU: half precision, long caches, and no waiting for the host."""

from __future__ import annotations

import pytest
import torch
from page_cases import assert_pages, make_bounds, make_keys

from lcpatch_kernels import page_bounds, page_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_half_precision(page_size, dtype):
    q, k = make_keys(5000, heads=8, kv_heads=2, head_dim=128, dtype=dtype, device="cuda")
    assert_pages(q, k, page_size, make_bounds((0, 5000), (1234, 5000), device="cuda"), "triton")


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_head_dims(head_dim):
    q, k = make_keys(700, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    assert_pages(q, k, 128, None, "triton")


def test_nothing_waits_for_the_host():
    q, k = make_keys(3000, dtype=torch.bfloat16, device="cuda")
    page_scores(q, *page_bounds(k, 128)[:2])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        low, high, mean = page_bounds(k, 128)
        got = page_scores(q, low, high), page_scores(q, mean)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in got)
