"""What a kernel keeps for its next call lies outside of the memory that its thread allocates: a CUDA graph owns that.

`torch.compile(mode="reduce-overhead")` directs what is allocated on its thread into its graphs' memory, and refuses a
step that leaves more alive there than its results. So the first call of a kernel in a process may be such a step.

And what a graph was recorded with stays where it is: the graph goes on reading there.
"""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from block_sparse_cases import make_problem, make_spec
from decode_cases import make_inputs
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcpatch_kernels import BlockSparseSpec
from lcpatch_kernels.block_sparse import Rule

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
    from lcpatch_kernels.block_sparse._triton_common import _table

    run = kernel()
    _table.cache_clear()
    with Allocated() as made:
        results = run()
    gc.collect()
    alive = {ref for ref in made.refs if not ref.expired()}
    assert _table.cache_info().currsize
    assert alive == set(storages(results))


@pytest.fixture
def tables(monkeypatch):
    """The module that keeps them, which has made none yet."""
    from lcpatch_kernels.block_sparse import _triton_common

    _triton_common._table.cache_clear()
    monkeypatch.setattr(_triton_common, "_recorded", {})
    return _triton_common


def many(tables, count=300):
    """As many others, of patterns that follow a text's length."""
    for sinks in range(count):
        tables.pack_table(BlockSparseSpec.of([Rule(sinks=sinks, back=1)] * 4), 2, None, torch.device("cpu"))


@pytest.mark.parametrize("kernel", [decode, attend, backward])
def test_a_table_that_a_graph_recorded_stays(kernel, tables, monkeypatch):
    run, made, real = kernel(), [], tables._pack_table
    tables._table.cache_clear()

    def pack(*args):
        table = real(*args)
        made.append((args[:4], weakref.ref(table), table.packs.data_ptr()))
        return table

    monkeypatch.setattr(tables, "_pack_table", pack)
    run()  # warms up
    with monkeypatch.context() as recording:
        recording.setattr(tables, "_is_recording", lambda device: True)
        run()
    recorded = list(made)
    many(tables)
    gc.collect()
    assert recorded
    assert all(ref() is not None for _, ref, _ in recorded)
    assert len(tables._recorded) == len(recorded)
    for key, ref, where in recorded:  # a later call reads it too, so that another graph keeps nothing more
        assert tables.pack_table(*key) is ref()
        assert ref().packs.data_ptr() == where


def test_other_tables_go(tables):
    """Negative control, and the bound: patterns that follow a text's length have no end."""
    spec = BlockSparseSpec.of([Rule(back=5)] * 4)
    table = weakref.ref(tables.pack_table(spec, 2, None, torch.device("cpu")))
    many(tables)
    gc.collect()
    assert table() is None
    assert tables._table.cache_info().currsize == 256
    assert not tables._recorded
