"""What a kernel keeps for its next call lies outside of the memory that its thread allocates: a CUDA graph owns that.

`torch.compile(mode="reduce-overhead")` directs what is allocated on its thread into its graphs' memory, and refuses a
step that leaves more alive there than its results. So the first call of a kernel in a process may be such a step.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch
from block_sparse_cases import make_problem, make_spec
from decode_cases import make_inputs
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


class Allocated(TorchDispatchMode):
    """The storages that operators of this thread made."""

    def __init__(self):
        super().__init__()
        self.refs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = func is torch.ops.aten.lift_fresh.default  # all that is seen of `torch.tensor`
        given = [] if fresh else storages((args, kwargs))
        self.refs += [ref for ref in storages(out) if ref not in given]
        return out


def storages(tree):
    return [StorageWeakRef(x.untyped_storage()) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def decode():
    from lcpatch_kernels.sparse_decode import triton

    given = make_inputs()
    return lambda: triton.forward(*given.values(), *[None] * 3, 1, *[None] * 3, 0.2, 0.0, True)


def attend():
    from lcpatch_kernels.block_sparse import triton

    p = make_problem(make_spec("s2", 4, 2, 16), 2, 40)
    return lambda: triton.forward(p.q, p.k, p.v, p.spec, None, 0.2, 0.0)


def backward():
    from lcpatch_kernels.block_sparse import triton

    p = make_problem(make_spec("s2", 4, 2, 16), 2, 40)
    out, lse = triton.forward(p.q, p.k, p.v, p.spec, None, 0.2, 0.0)
    return lambda: triton.backward(p.grad_out, p.grad_lse, p.q, p.k, p.v, out, lse, p.spec, None, 0.2, 0.0)


@pytest.mark.parametrize("kernel", [decode, attend, backward])
def test_nothing_but_results_outlives_a_first_call(kernel):
    from lcpatch_kernels.block_sparse._triton_common import pack_table

    run = kernel()
    pack_table.cache_clear()
    with Allocated() as made:
        results = run()
    gc.collect()
    alive = {ref for ref in made.refs if not ref.expired()}
    assert pack_table.cache_info().currsize
    assert alive == set(storages(results))
