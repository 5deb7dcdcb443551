"""The decode kernel on a GPU: half precision, float8, many splits, and CUDA graphs that replay at another length."""

from __future__ import annotations

import pytest
import torch
from decode_cases import assert_decodes, make_inputs, quantised, results

from lcpatch_kernels import sparse_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"device": "cuda", "heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 1000, 20011])
@pytest.mark.parametrize("kind", ["s2", "mixed", None])
def test_lengths(kind, keys, dtype):
    assert_decodes(make_inputs(kind, keys, dtype=dtype, **GPU))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_head_dims(head_dim):
    assert_decodes(make_inputs("s2", 5000, dtype=torch.bfloat16, **GPU | {"head_dim": head_dim}))


def test_lists_of_pages_with_bias():
    rng = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(80, generator=rng)[:40] for _ in range(4)]).view(2, 2, -1).int().cuda()
    num_keys = torch.tensor([[2560, 700], [1, 0]], dtype=torch.int32).cuda()
    bias = torch.randn(2, 2, 5120, device="cuda")
    options = {"slots": slots, "num_keys": num_keys, "page_size": 64, "bias": bias}
    assert_decodes(make_inputs(None, 5120, dtype=torch.bfloat16, **GPU, **options))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_keys_and_values(dtype):
    assert_decodes(quantised(make_inputs("s2", 3000, dtype=torch.bfloat16, **GPU), dtype))


def test_a_graph_replays_at_another_length_without_waiting_for_the_host():
    inputs = make_inputs("s2", 9000, dtype=torch.bfloat16, **GPU)
    inputs["bounds"] = torch.tensor([[0, 9000], [100, 4000]], dtype=torch.int32, device="cuda")
    sparse_decode(**inputs)  # compiles, and copies the pattern's integers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out, lse = sparse_decode(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs["bounds"].copy_(torch.tensor([[7, 8005], [0, 333]], dtype=torch.int32))
    graph.replay()
    want_out, want_lse, _ = results(inputs, "triton")
    assert torch.equal(out.double(), want_out)
    assert torch.equal(lse.double(), want_lse)
