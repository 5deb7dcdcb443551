"""The Triton kernels, interpreted on the CPU: every branch, at odd sizes, against the dense oracle in float64."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from block_sparse_cases import KINDS, make_problem, make_spec, poison_outside
from budget import assert_within, exact, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch_kernels.block_sparse import BlockSparseSpec, Rule

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process"),
    # Rows of a tile that do not exist divide by zero and are not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True, scope="module")
def nan_filled_memory():
    """A result that a kernel does not write is NaN, and NaN never passes."""
    patch, empty = pytest.MonkeyPatch(), torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    patch.setattr(torch, "empty", poisoned)
    yield
    patch.undo()


# The interpreter's tiles are 2 heads x 32 rows (1 x 64 for an odd group) x 32 keys: blocks of 16 are gathered two a
# step, blocks of 64 take two steps each.
@pytest.mark.parametrize(
    ("kind", "block_size"),
    [(kind, 16) for kind in KINDS]
    + [(kind, b) for kind in ("s2", "s2_odd_sinks", "s2_token_window") for b in (32, 64)],
)
def test_every_kind_of_rule(kind, block_size):
    problem = make_problem(make_spec(kind, 4, 2, block_size), 2, 3 * block_size + 53, batch=1, head_dim=16)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens"),
    [
        (2, 2, 64, 63),
        (4, 2, 128, 111),
        (9, 3, 80, 130),
        (8, 2, 96, 65),
        (8, 1, 32, 111),
        (2, 1, 256, 40),
        (3, 1, 64, 1),
    ],
)
def test_head_groups_and_dims(heads, kv_heads, head_dim, tokens):
    problem = make_problem(make_spec("s2", heads, kv_heads, 16), kv_heads, tokens, batch=1, head_dim=head_dim)
    assert_within(run(problem, "triton"), problem)


LAYOUTS = {
    "left_padded": (70, 70, [[[13, 70, 13, 70]], [[0, 70, 0, 70]]]),
    "right_padded": (70, 70, [[[0, 51, 0, 51]], [[0, 1, 0, 1]]]),
    "packed": (100, 100, [[[0, 37, 0, 37], [37, 38, 37, 38], [38, 100, 38, 100]], [[0, 90, 0, 90], [0] * 4, [0] * 4]]),
    "one_row_of_bounds": (60, 60, [[[3, 20, 3, 20], [25, 60, 25, 60]]]),
    "chunk": (37, 100, None),
    "chunk_padded": (37, 100, [[[0, 37, 20, 100]], [[5, 37, 32, 100]]]),
    "static_cache": (20, 128, [[[0, 20, 0, 90]], [[0, 20, 11, 95]]]),
    "one_query": (1, 133, None),
    "one_query_static": (1, 133, [[[0, 1, 0, 77]], [[0, 1, 9, 133]]]),
    "few_queries": (7, 133, [[[0, 7, 0, 130]], [[3, 7, 0, 4]]]),
    "nothing": (9, 12, [[[0, 0, 0, 0]], [[4, 4, 5, 5]]]),
    "gap": (60, 47, [[[0, 60, 0, 47, 60]], [[7, 51, 3, 40, 100]]]),
    "gap_overlap": (60, 100, [[[0, 60, 0, 100, 13]], [[0, 33, 20, 81, 1]]]),
    "gap_packed": (60, 90, [[[0, 9, 0, 31, 0], [9, 40, 31, 70, 31]], [[3, 40, 2, 7, 70], [0] * 5]]),
}
"""Queries, keys, bounds; a segment's fifth number is its gap."""


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("s2_odd_sinks", layout) for layout in LAYOUTS]
    + [("mixed", "packed"), ("mixed", "chunk"), ("share", "left_padded"), ("stripe_only", "gap")]
    + [("sf", layout) for layout in ("left_padded", "right_padded", "packed", "chunk_padded", "nothing")]
    + [(kind, gap) for kind in ("dense", "sf", "mixed") for gap in ("gap", "gap_overlap", "gap_packed")],
)
def test_layouts(kind, layout):
    queries, keys, bounds = LAYOUTS[layout]
    problem = make_problem(make_spec(kind, 4, 2, 16), 2, queries, keys, bounds=bounds, head_dim=16)
    want = exact(problem)
    if bounds is not None:
        problem = poison_outside(problem)
    got = run(problem, "triton")
    assert_within(got, poisoned_free(problem), want)


def poisoned_free(problem):
    return replace(problem, k=problem.k.nan_to_num(), v=problem.v.nan_to_num())


@pytest.mark.parametrize("kind", ["dense", "s2"])
def test_softcap(kind):
    problem = make_problem(make_spec(kind, 4, 2, 16), 2, 75, batch=1, softcap=2.0)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scale(scale):
    problem = replace(make_problem(make_spec("s2", 2, 1, 16), 1, 75, batch=1), scale=scale)
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize("kind", ["dense", "s2_odd_sinks"])
def test_scores_far_above_a_rows_own(kind):
    """The forward subtracts a row's score with itself; where another's is too far above, it must start over."""
    problem = make_problem(make_spec(kind, 4, 2, 16), 2, 75, batch=1)
    problem.k[:, :, 5] *= 40
    own, far = ((problem.q[:, ::2] * k).sum(-1) * 32**-0.5 for k in (problem.k, problem.k[:, :, 5:6]))
    assert 0.1 < ((far - own)[..., 5:] > 64 * math.log(2)).float().mean() < 0.8  # some rows, and not all
    got, want = run(problem, "triton"), exact(problem)
    # The gradients' error is the rounding of LSEs of some hundreds, whatever the forward does.
    assert_within(replace(got, dq=want.dq, dk=want.dk, dv=want.dv), problem, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_index_alike(dtype):
    """Only indexing and casts: the interpreter multiplies in fp32 and truncates when it stores bf16."""
    problem = make_problem(make_spec("s2", 4, 2, 16), 2, 75, batch=1, dtype=dtype)
    assert_within(run(problem, "triton"), problem)


def test_strides():
    """Contiguous heads, a view with gaps, and a last dimension that is not contiguous."""
    problem = make_problem(make_spec("s2", 4, 2, 16), 2, 75, batch=1)
    wide = torch.randn(1, 2, 75, 96)
    q, k, v = problem.q.contiguous(), wide[..., 32:64], problem.v.mT.contiguous().mT
    problem = replace(problem, q=q, k=k, v=v, grad_out=torch.ones(()).expand_as(q))
    assert_within(run(problem, "triton"), problem)


@pytest.mark.parametrize(
    "change",
    [{"stride": 5}, {"residue": 3}, {"group": 17}, {"sinks": 17}, {"back": 31}, {"back": 33}, {"shifted": True}],
)
def test_the_comparison_sees_a_wrong_rule(change):
    rule = Rule(sinks=16, stride=4, residue=2, group=16, back=32)
    problem = make_problem(BlockSparseSpec.of([rule] * 2, 16), 1, 150, batch=1, head_dim=16)
    got = run(problem, "triton", BlockSparseSpec.of([replace(rule, **change)] * 2, 16))
    with pytest.raises(AssertionError, match=r"out.*dq.*dk.*dv"):
        assert_within(got, problem)


@pytest.mark.parametrize("change", [{"sinks": 3}, {"sinks": 17}, {"back": 8}])
def test_the_comparison_sees_wrong_sinks(change):
    """Sinks without a stripe have a kernel of their own."""
    rule = Rule(sinks=4, group=1, back=30)
    problem = make_problem(BlockSparseSpec.of([rule] * 2, 16), 1, 150, batch=1, head_dim=16)
    got = run(problem, "triton", BlockSparseSpec.of([replace(rule, **change)] * 2, 16))
    with pytest.raises(AssertionError, match=r"out.*dq.*dk.*dv"):
        assert_within(got, problem)


rules = st.builds(
    lambda sinks, stripe, group, shifted, back: Rule(sinks, *stripe, group, shifted, back),
    st.integers(0, 40),
    st.integers(0, 5).flatmap(lambda v: st.tuples(st.just(v), st.integers(0, max(v - 1, 0)))),
    st.one_of(st.integers(1, 70), st.fractions(Fraction(1, 9), 1, max_denominator=9)),
    st.booleans(),
    st.one_of(st.integers(0, 60), st.just(1 << 30)),
)


@st.composite
def segment_rows(draw, max_segments=3):
    """One batch row: segments in order with gaps between, each with no more queries than keys and gap."""
    q, k, row = 0, 0, []
    for _ in range(max_segments):
        q, k = q + draw(st.integers(0, 9)), k + draw(st.integers(0, 9))
        num_q = draw(st.integers(0, 45))
        num_k = num_q + draw(st.integers(0, 40)) if num_q else 0
        gap = draw(st.sampled_from([0, 0, 1, 30, 200])) if num_q else 0
        cut = draw(st.integers(0, min(gap, num_k)))
        row.append([q, q + num_q, k, k + num_k - cut, gap])
        q, k = q + num_q, k + num_k - cut
    return row


@settings(max_examples=6)
@given(st.lists(rules, min_size=2, max_size=2), segment_rows(), st.sampled_from([16, 64]))
def test_random_rules_and_segments(two_rules, row, block_size):
    queries, keys = max(s[1] for s in row) + 2, max(s[3] for s in row) + 2
    spec = BlockSparseSpec.of([two_rules[0]] * 2 + [two_rules[1]], block_size)
    problem = make_problem(spec, 1, queries, max(queries, keys), batch=1, head_dim=16, bounds=[row])
    want = exact(problem)
    got = run(poison_outside(problem), "triton")
    assert_within(got, poisoned_free(problem), want)
