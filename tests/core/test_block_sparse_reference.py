"""The tiled reference against the dense oracle on random rules and bounds, in float64: both results, every gradient."""

from dataclasses import fields
from fractions import Fraction

import pytest
import torch
from budget import Problem, Results, assert_within, exact, run
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import distance

from lcpatch_kernels import DENSE, BlockSparseSpec, Rule, block_sparse
from lcpatch_kernels.block_sparse import _forward

BLOCK = 16

groups = st.one_of(st.integers(1, 50), st.builds(Fraction, st.just(1), st.integers(1, 9)), st.just(Fraction(3, 7)))


@st.composite
def rules(draw) -> Rule:
    stride = draw(st.integers(0, 4))
    return Rule(
        sinks=draw(st.integers(0, 40)),
        stride=stride,
        residue=draw(st.integers(0, max(0, stride - 1))),
        group=draw(groups),
        shifted=draw(st.booleans()),
        back=draw(st.one_of(st.integers(0, 60), st.just(DENSE.back))),
    )


@st.composite
def segments(draw, num_queries: int, num_keys: int, most: int, gaps: bool) -> list[list[int]]:
    """Up to `most` disjoint segments, some of them empty, none with more queries than keys (and gap)."""
    found, q, k = [], 0, 0
    for _ in range(most):
        q0, k0 = draw(st.integers(q, num_queries)), draw(st.integers(k, num_keys))
        k1 = draw(st.integers(k0, num_keys))
        gap = draw(st.integers(0, 70)) if gaps else 0
        q1 = draw(st.integers(q0, min(num_queries, q0 + k1 - k0 + gap)))
        found.append([q0, q1, k0, k1, gap] if gaps else [q0, q1, k0, k1])
        q, k = q1, k1
    return found


@st.composite
def problems(draw) -> Problem:
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    heads, batch = kv_heads * group, draw(st.integers(1, 2))
    num_queries = draw(st.integers(1, 150))
    num_keys = draw(st.integers(num_queries, 200))
    bounds = None
    if draw(st.booleans()):
        most, rows, gaps = draw(st.integers(1, 3)), draw(st.sampled_from(sorted({1, batch}))), draw(st.booleans())
        drawn = [draw(segments(num_queries, num_keys, most, gaps)) for _ in range(rows)]
        bounds = torch.tensor(drawn, dtype=torch.int32)
    spec = BlockSparseSpec.of([draw(rules()) for _ in range(heads)], BLOCK)
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    q, do = normal(batch, heads, num_queries, 8), normal(batch, heads, num_queries, 8)
    k, v = normal(batch, kv_heads, num_keys, 8), normal(batch, kv_heads, num_keys, 8)
    softcap = draw(st.sampled_from([0.0, 1.5]))
    scale = draw(st.sampled_from([None, 1.0]))
    return Problem(spec, q, k, v, do, normal(batch, heads, num_queries), bounds, scale, softcap)


def assert_equal_in_float64(got: Results, want: Results) -> None:
    eps = torch.finfo(torch.float64).eps
    for field in fields(Results):
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert not a.isnan().any(), field.name
        largest = float(b.masked_fill(b.isinf(), 0).abs().max().clamp(min=1))
        assert distance(a, b) <= 200 * 8 * eps * largest, field.name  # sums of up to 200 keys x 8 channels


@settings(max_examples=80)
@given(problems())
def test_random_rules_and_bounds(problem: Problem):
    assert_equal_in_float64(run(problem, "reference"), exact(problem))


@settings(max_examples=60)
@given(st.lists(rules(), min_size=1, max_size=3), st.integers(1, 200))
def test_random_densities(drawn: list[Rule], length: int):
    spec = BlockSparseSpec.of(drawn, BLOCK)
    pairs = 0
    for rule in drawn:
        for i in range(length):
            lo = rule.lo(i, length)
            striped = {j for j in range(i + 1) if rule.stride and j // BLOCK % rule.stride == rule.residue}
            pairs += sum(1 for j in range(i + 1) if j >= lo or j < rule.sinks or j in striped)
    assert spec.density(length) == pytest.approx(pairs / (len(drawn) * length * (length + 1) // 2))


@settings(max_examples=60)
@given(st.lists(rules(), min_size=1, max_size=4))
def test_random_specs_survive_the_schema(drawn: list[Rule]):
    spec = BlockSparseSpec.of(drawn, BLOCK)
    assert BlockSparseSpec.from_ints(spec.to_ints()) == spec


def small(dtype: torch.dtype = torch.float64, impl: str = "reference") -> tuple:
    spec = BlockSparseSpec.of([Rule(2, 3, 1, group=16, back=0), Rule(1, group=10, shifted=True, back=4)], BLOCK)
    torch.manual_seed(0)
    q = torch.randn(2, 2, 30, 4, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 1, 40, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    bounds = torch.tensor([[[0, 12, 0, 14], [12, 29, 15, 40]], [[5, 30, 3, 40], [30, 30, 40, 40]]], dtype=torch.int32)
    return q, k, v, bounds, spec, impl


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_by_finite_differences(softcap: float):
    """Of the output and of the log-sum-exp."""
    q, k, v, bounds, spec, impl = small()

    def f(q, k, v):
        out, lse = block_sparse(q, k, v, spec, bounds=bounds, softcap=softcap, impl=impl)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(f, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bounds", [True, False])
def test_opcheck(dtype: torch.dtype, with_bounds: bool):
    """Schema, fake, autograd registration and tracing with dynamic shapes."""
    q, k, v, bounds, spec, _ = small(dtype)
    args = (q, k, v, bounds if with_bounds else None, spec.to_ints(), 0.5, 0.0, "reference")
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == torch.bfloat16:
        utils.remove("test_aot_dispatch_dynamic")  # compares gradients more finely than bf16 can be added up
    torch.library.opcheck(_forward, args, test_utils=utils)


def test_rows_in_no_segment():
    """Zero and -inf, and no gradient, whatever the buffers held before."""
    q, k, v, bounds, spec, impl = small()
    bounds = bounds.clone()
    bounds[1] = 0
    out, lse = block_sparse(q, k, v, spec, bounds=bounds, impl=impl)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert (lse[0, :, 29] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(x[1].any() for x in (dq, dk, dv))
    assert not dk[0, :, 14].any()  # a key between two segments
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 80, 96, 256])
def test_low_precision(dtype: torch.dtype, head_dim: int):
    torch.manual_seed(head_dim)
    spec = BlockSparseSpec.of([Rule(0, 3, r, group=16, back=16) for r in (0, 0, 2, 2)], BLOCK)
    q, do = torch.randn(2, 1, 4, 77, head_dim).to(dtype)
    k, v = torch.randn(2, 1, 2, 77, head_dim).to(dtype)
    problem = Problem(spec, q, k, v, do, torch.randn(q.shape[:3]))
    assert_within(run(problem, "reference"), problem)


def test_output_layout_is_what_hugging_face_transposes_to():
    q, k, v, bounds, spec, impl = small()
    out, _ = block_sparse(q, k, v, spec, bounds=bounds, impl=impl)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 1, 40, 5)}, r"are wanted; got"),
        ({"q": torch.zeros(2, 2, 30, 5)}, "differ in batch or head dim"),
        ({"q": torch.zeros(2, 3, 30, 4)}, "the spec describes 2 query heads, q has 3"),
        ({"q": torch.zeros(2, 2, 41, 4), "bounds": None}, "41 queries need at least as many keys; got 40"),
        ({"q": torch.zeros(2, 2, 30, 4).half()}, "must share one floating dtype"),
        ({"bounds": torch.zeros(3, 1, 4, dtype=torch.int32)}, r"bounds must be \[2 or 1, N, 4 or 5\]"),
        ({"bounds": torch.zeros(2, 1, 4)}, "bounds must be int32"),
        ({"impl": "cuda"}, "impl='cuda' is not one of 'auto'"),
    ],
)
def test_wrong_arguments(change: dict, message: str):
    q, k, v, bounds, spec, impl = small(torch.float32)
    given_ = {"q": q, "k": k, "v": v, "bounds": bounds, "impl": impl, **change}
    with pytest.raises(ValueError, match=message):
        block_sparse(given_["q"], given_["k"], given_["v"], spec, bounds=given_["bounds"], impl=given_["impl"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(sinks=-1), "must be >= 0"),
        (lambda: Rule(group=0), "group must be > 0"),
        (lambda: Rule(stride=3, residue=3), r"residue=3 must lie in \[0, stride=3\)"),
        (lambda: Rule(group=Fraction(3, 2)), "must be <= 1"),
        (lambda: BlockSparseSpec.of([DENSE], 24), "block_size=24 must be a power of two"),
        (lambda: BlockSparseSpec.of([]), "at least one query head"),
        (lambda: BlockSparseSpec(16, (DENSE,), (1,)), r"head_rules=\(1,\) must index the 1 rules"),
        (lambda: BlockSparseSpec.of([DENSE] * 4).packs(3), "4 query heads cannot be grouped over 3 KV heads"),
    ],
)
def test_wrong_specs(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
