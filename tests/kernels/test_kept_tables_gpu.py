"""On a GPU the first call of a kernel in a process may be a compiled one, which warms up a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import make_problem, make_spec
from decode_cases import make_inputs

from lcpatch_kernels import block_sparse, sparse_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = {"head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}


def decode():
    given = make_inputs("s2", 1000, heads=8, kv_heads=2, **SHAPE)
    spec = given.pop("spec")
    return lambda q, k, v: sparse_decode(q, k, v, spec=spec), lambda step: step(**given)


def attend():
    p = make_problem(make_spec("s2", 8, 2, 64), 2, 1000, **SHAPE)
    x = [t.requires_grad_() for t in (p.q, p.k, p.v)]

    def run(step):
        out, _ = step(*x)
        return out, *torch.autograd.grad(out, x, p.grad_out)

    return lambda q, k, v: block_sparse(q, k, v, p.spec), run


@pytest.mark.parametrize("kernel", [decode, attend])
def test_a_first_call_may_be_compiled(kernel):
    from torch._dynamo.utils import counters

    from lcpatch_kernels.block_sparse._triton_common import pack_table

    function, run = kernel()
    torch._dynamo.reset()  # with the graphs that read the tables
    pack_table.cache_clear()
    counters.clear()
    step = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warms up, is recorded, is replayed
        got = [x.clone() for x in run(step)]
    assert not counters["inductor"]["cudagraph_skips"]
    for x, want in zip(got, run(function), strict=True):
        assert torch.equal(x, want)
