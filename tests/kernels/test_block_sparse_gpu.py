"""The Triton kernels on a GPU in half precision: what the interpreter cannot show (tensor cores, races, graphs, syncs).

Compiling dominates, so the cases vary what costs no compilation (lengths, rules of one class) and little else.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_sparse_cases import make_problem, make_spec, poison_outside
from budget import Problem, assert_within, exact, run, same_dtype

from lcpatch_kernels.block_sparse import BlockSparseSpec, Rule, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16 = torch.bfloat16, torch.float16
PACKED = [[[0, 300, 0, 300], [300, 301, 300, 301], [301, 990, 301, 990]], [[0, 1000, 0, 1000], [0] * 4, [0] * 4]]


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch):
    """A result that a kernel does not write is NaN, and NaN never passes."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


def problem_on_gpu(kind: str, tokens: int, keys: int | None = None, **options) -> Problem:
    heads, kv_heads = options.pop("heads", 8), options.pop("kv_heads", 2)
    spec = make_spec(kind, heads, kv_heads, options.pop("block_size", 64))
    defaults = {"batch": 1, "head_dim": 128, "dtype": BF16, "device": "cuda"}
    return make_problem(spec, kv_heads, tokens, keys, **defaults | options)


@pytest.mark.parametrize("tokens", [1, 500, 1000, 4097])
@pytest.mark.parametrize("kind", ["s2", "mixed"])
def test_lengths(kind, tokens):
    problem = problem_on_gpu(kind, tokens)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize(
    "kind",
    ["dense", "s2_odd_sinks", "s2_token_window", "s2_per_head", "window", "many_sinks", "sf", "group", "share"],
)
def test_every_kind_of_rule(kind):
    problem = problem_on_gpu(kind, 1000)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(block_size):
    problem = problem_on_gpu("s2", 1000, block_size=block_size)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, BF16), (96, FP16), (128, FP16), (256, BF16)])
def test_head_dims(head_dim, dtype):
    problem = problem_on_gpu("s2", 1000, heads=8, kv_heads=1, head_dim=head_dim, dtype=dtype)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_sinks_of_other_head_dims(head_dim):
    problem = problem_on_gpu("sf", 1000, head_dim=head_dim)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_scores_far_above_a_rows_own(dtype):
    """The forward subtracts a row's score with itself; where another's is too far above, it must start over."""
    problem = problem_on_gpu("s2", 1000, dtype=dtype)
    problem.k[:, :, 5] *= 30
    got, want = run(problem, "triton"), exact(problem)
    # The gradients' error is the rounding of LSEs of some hundreds, whatever the forward does.
    assert_within(replace(got, dq=want.dq, dk=want.dk, dv=want.dv), problem, want)


def test_fp32():
    problem = problem_on_gpu("s2", 500, head_dim=64, dtype=torch.float32)
    assert_within(run(problem, "triton"), problem)


def test_odd_group():
    problem = problem_on_gpu("s2", 500, heads=3, kv_heads=1, head_dim=64)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize(
    ("queries", "keys", "bounds"),
    [
        (1000, 1000, [[[317, 1000, 317, 1000]], [[0, 903, 0, 903]]]),
        (1000, 1000, PACKED),
        (500, 2000, [[[0, 500, 77, 1300]], [[20, 500, 0, 480]]]),
        (500, 1300, None),
        (700, 1000, [[[0, 700, 0, 1000, 300]], [[20, 500, 100, 900, 1]]]),
        (900, 800, [[[0, 317, 0, 400, 0], [317, 850, 400, 777, 533]], [[0, 900, 3, 703, 900], [0] * 5]]),
    ],
    ids=["padded", "packed", "static_cache", "chunk", "gap", "gap_packed"],
)
@pytest.mark.parametrize("kind", ["mixed", "sf"])
def test_layouts(kind, queries, keys, bounds):
    problem = problem_on_gpu(kind, queries, keys, batch=2, bounds=bounds)
    want = exact(problem)
    if bounds is not None:
        problem = poison_outside(problem)
    got = run(problem, "triton")
    clean = replace(problem, k=problem.k.nan_to_num(), v=problem.v.nan_to_num())
    assert_within(got, clean, want)


def test_softcap():
    problem = problem_on_gpu("s2", 500, softcap=5.0)
    assert_within(run(problem, "triton"), problem)


def test_the_comparison_sees_a_wrong_rule():
    rule = Rule(sinks=64, stride=4, residue=2, group=64, back=128)
    problem = replace(problem_on_gpu("s2", 1000), spec=BlockSparseSpec.of([rule] * 8))
    for change in ({"stride": 5}, {"sinks": 63}, {"back": 127}, {"back": 129}):
        got = run(problem, "triton", BlockSparseSpec.of([replace(rule, **change)] * 8))
        with pytest.raises(AssertionError):
            assert_within(got, problem)


@pytest.mark.parametrize("kind", ["s2", "sf"])
def test_same_bits_every_run(kind):
    problem = problem_on_gpu(kind, 4097)
    first = run(problem, "triton")
    for _ in range(7):
        again = run(problem, "triton")
        assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("bounds", [None, [[[317, 1000, 317, 1000]]]])
def test_nothing_waits_for_the_device(bounds):
    problem = problem_on_gpu("s2", 1000, bounds=bounds)
    run(problem, "triton")  # compiles, and copies the pattern's integers to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(problem, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_bounds():
    """Captured once: the bounds are read on the device, so a replay follows what they hold then."""
    problem = problem_on_gpu("s2", 1000, bounds=[[[0, 1000, 0, 1000]]])
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        run(problem, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(problem, "triton")
    for bounds in ([[[0, 1000, 0, 1000]]], [[[123, 900, 123, 900]]]):
        problem.bounds.copy_(torch.tensor(bounds, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert_within(got, problem)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "chosen"), [(64, BF16, "flex"), (8, BF16, "sdpa"), (64, torch.float64, "sdpa")]
)
def test_rolled_groups_of_any_width_and_dtype(head_dim, dtype, chosen):
    """No kernel of ours runs them, and FlexAttention neither the narrowest heads nor float64."""
    spec = BlockSparseSpec.of([Rule(group=96, back=0, cyclic=True, shifted=h % 2 == 1) for h in range(8)])
    problem = make_problem(spec, 2, 300, batch=1, head_dim=head_dim, dtype=dtype, device="cuda")
    assert choose("auto", problem.q, spec) == chosen
    assert_within(run(problem, "auto"), problem)


@pytest.mark.xdist_group("much memory")
def test_128k_tokens():
    """A length at which tiles no longer all run at once, and offsets pass 2^31 bytes: against the reference in fp32.

    A dense mask does not fit there, so the budget is relative: twice what same-dtype arithmetic loses on a short text.
    """
    rules = [Rule(stride=16, residue=-(h // 4) % 16, group=64, back=15 * 64) for h in range(32)]
    spec = BlockSparseSpec.of(rules)
    short, long = (make_problem(spec, 8, n, batch=1, head_dim=128, dtype=BF16, device="cuda") for n in (1500, 131072))
    true, rough = exact(short), same_dtype(short)
    want, got = run(long.to(torch.float32), "reference"), run(long, "triton")
    for name in ("out", "lse", "dq", "dk", "dv"):
        budget = 2 * relative(getattr(rough, name), getattr(true, name))
        assert relative(getattr(got, name), getattr(want, name)) <= budget, name


def relative(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true.double()).norm() / true.double().norm())
