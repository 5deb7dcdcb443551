"""On a GPU the first call of a kernel in a process may be a compiled one, which warms up a CUDA graph.

What a graph was recorded with stays, whatever is asked for afterwards.
"""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import make_problem, make_spec
from decode_cases import make_inputs

from lcpatch_kernels import BlockSparseSpec, block_sparse, sparse_decode
from lcpatch_kernels.block_sparse import Rule

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

    from lcpatch_kernels.block_sparse._triton_common import _recorded, _table

    function, run = kernel()
    torch._dynamo.reset()  # with the graphs that read the tables
    _table.cache_clear()
    _recorded.clear()
    counters.clear()
    step = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warms up, is recorded, is replayed
        got = [x.clone() for x in run(step)]
    assert not counters["inductor"]["cudagraph_skips"]
    for x, want in zip(got, run(function), strict=True):
        assert torch.equal(x, want)


def test_a_graph_reads_the_table_that_it_was_recorded_with():
    from lcpatch_kernels.block_sparse._triton_common import _recorded, _table, pack_table

    _table.cache_clear()
    _recorded.clear()
    given = make_inputs("s2", 1000, heads=8, kv_heads=2, **SHAPE)
    want, _ = sparse_decode(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = sparse_decode(**given)
    for sinks in range(300):
        pack_table(BlockSparseSpec.of([Rule(sinks=sinks, back=1)] * 8), 2, None, got.device)
    junk = [torch.full((128,), 1 << 20, dtype=torch.int32, device="cuda") for _ in range(5000)]  # where it lay
    graph.replay()
    assert torch.equal(got, want)
    assert len(_recorded) == 1
    del junk
