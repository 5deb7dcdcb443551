"""A bias on the keys of `block_sparse` on a GPU: half precision, whole tiles, rows padded and apart from their keys."""

from __future__ import annotations

import pytest
import torch
from bias_cases import assert_biased, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"device": "cuda", "heads": 8, "kv_heads": 2, "block_size": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(200, 1100), (1000, 1000), (513, 3001)])
def test_a_chunk_over_a_past(queries, keys, head_dim, dtype):
    assert_biased(make_inputs("dense", queries, keys, dtype=dtype, head_dim=head_dim, **GPU), "triton")


@pytest.mark.parametrize("kind", ["dense", "s2"])
def test_bounds_and_softcap(kind):
    rows = torch.tensor([[[0, 200, 100, 1100]], [[150, 200, 900, 1100]]], dtype=torch.int32, device="cuda")
    options = {"dtype": torch.bfloat16, "head_dim": 128, "bounds": rows, "softcap": 20.0}
    assert_biased(make_inputs(kind, 200, 1100, **options, **GPU), "triton")
