"""Soft matching and merging on a GPU: half precision, long caches, and no waiting for the host."""

from __future__ import annotations

import pytest
import torch
from cluster_cases import assert_matches, assert_merges, make_inputs

from lcpatch_kernels import cluster_merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("chunk", "merges"), [(64, 32), (128, 64), (256, 100), (6, 2)])
def test_matches_and_merges(chunk, merges, dtype):
    """fp32 takes half as many slots of a chunk: its heads are half as wide here."""
    head_dim = 64 if dtype == torch.float32 else 128
    k, v, size = make_inputs(1000, pads=(0, 333), kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    *got, target = cluster_merge(k, v, size, chunk=chunk, merges=merges, impl="triton")
    assert_matches(k, size, chunk, merges, target)
    assert_merges((k, v, size), target, tuple(got), chunk, merges)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_head_dims(head_dim):
    k, v, size = make_inputs(500, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    *got, target = cluster_merge(k, v, size, impl="triton")
    assert_matches(k, size, 128, 64, target)
    assert_merges((k, v, size), target, tuple(got), 128, 64)


@pytest.mark.xdist_group("much memory")
def test_offsets_beyond_int32():
    """17 rows of 128K keys in 8 heads of 128: the last row's offset is above 2^31 elements."""
    k = torch.randn(1, 8, 1 << 17, 128, dtype=torch.bfloat16, device="cuda").expand(17, -1, -1, -1).contiguous()
    size = torch.ones(k.shape[:3], device="cuda")
    k_out, v_out, n, _ = cluster_merge(k, k, size, impl="triton")
    assert torch.equal(k_out[0], k_out[16])
    assert torch.equal(k_out, v_out)
    assert (n.sum(-1) == 1 << 17).all()


def test_nothing_waits_for_the_host():
    inputs = make_inputs(700, dtype=torch.bfloat16, device="cuda")
    cluster_merge(*inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = cluster_merge(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = cluster_merge(*inputs, impl="reference")
    assert torch.equal(got[2].sum(-1), want[2].sum(-1))
