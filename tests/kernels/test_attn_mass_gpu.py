"""Column sums of attention on a GPU: half precision, long rows, chunks over a long past."""

from __future__ import annotations

import pytest
import torch
from mass_cases import assert_sums, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"device": "cuda", "heads": 8, "kv_heads": 2, "head_dim": 128, "batch": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "keys"), [(1, 20011), (1000, 1000), (513, 9001), (4099, 4099)])
def test_lengths(queries, keys, dtype):
    assert_sums(make_inputs(queries, keys, dtype=dtype, **GPU))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_head_dims_and_reductions(head_dim, reduce):
    assert_sums(make_inputs(700, 3000, dtype=torch.bfloat16, reduce=reduce, **GPU | {"head_dim": head_dim}))


def test_bounds_and_softcap():
    rows = torch.tensor([[[0, 700, 100, 3000]], [[650, 700, 2950, 3000]]], dtype=torch.int32, device="cuda")
    assert_sums(make_inputs(700, 3000, dtype=torch.bfloat16, bounds=rows, softcap=20.0, **GPU | {"batch": 2}))
