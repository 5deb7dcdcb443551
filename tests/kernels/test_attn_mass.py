"""Column sums of attention: the reference against a plain softmax, the kernel (interpreted) against the reference."""

from __future__ import annotations

import pytest
import torch
from mass_cases import assert_sums, exact, make_inputs

from lcpatch_kernels import attn_mass

kernel = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests need a machine without a GPU")


def bounds(*rows: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)[:, None]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_reference_is_the_softmax_summed_over_queries(reduce, softcap):
    inputs = make_inputs(150, 203, dtype=torch.float64, reduce=reduce, softcap=softcap)
    q, k = inputs["q"].unflatten(1, (3, 2)), inputs["k"][:, :, None]
    scores = q @ k.mT / 32**0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    causal = torch.ones(150, 203, dtype=torch.bool).tril(203 - 150)
    p = scores.masked_fill(~causal, -torch.inf).softmax(-1).sum(-2)
    want = {"sum": p.sum, "mean": p.mean, "max": p.amax}[reduce](2)
    eps = torch.finfo(torch.float64).eps * 203
    assert (exact(inputs) - want).abs().max() <= eps * want.max()


def test_the_sums_of_a_row_are_its_queries():
    """Each query gives one in all: what the keys of a row got together is heads times queries."""
    inputs = make_inputs(90, 90, dtype=torch.float64)
    total = exact(inputs).sum((1, 2))
    assert (total - 6 * 90).abs().max() <= torch.finfo(torch.float64).eps * 90 * total.max()


@kernel
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 203), (2, 130), (70, 203), (203, 203), (65, 66)])
def test_lengths(queries, keys):
    assert_sums(make_inputs(queries, keys))


@kernel
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_reductions(reduce, queries):
    assert_sums(make_inputs(queries, heads=8, kv_heads=2, reduce=reduce, batch=1))


@kernel
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (5, 1)])
def test_groups_of_query_heads(heads, kv_heads):
    assert_sums(make_inputs(heads=heads, kv_heads=kv_heads, batch=1))


@kernel
@pytest.mark.parametrize(
    "rows",
    [((0, 70, 0, 203), (0, 70, 17, 150)), ((3, 70, 40, 203), (70, 70, 203, 203)), ((69, 70, 202, 203), (0, 1, 0, 90))],
)
def test_bounds(rows):
    assert_sums(make_inputs(bounds=bounds(*rows)))


@kernel
def test_one_query_with_bounds():
    assert_sums(make_inputs(1, bounds=bounds((0, 1, 5, 203), (1, 1, 203, 203)), heads=9))


@kernel
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_head_dims(head_dim):
    assert_sums(make_inputs(33, 90, head_dim=head_dim, batch=1))


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 140])
def test_half_precision_softcap_and_scale(dtype, queries):
    assert_sums(make_inputs(queries, dtype=dtype, softcap=5.0, scale=0.3, batch=1))


@kernel
def test_strides():
    inputs = make_inputs(70, 128)
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["k"] = torch.cat([inputs["k"], inputs["k"]], 2)[:, :, :128]
    assert_sums(inputs)


@kernel
def test_a_wrong_diagonal_is_seen():
    inputs = make_inputs(70, 203)
    wrong = exact(inputs | {"bounds": bounds(*[(0, 70, 0, 202)] * 2)})
    with pytest.raises(AssertionError):
        assert_sums(inputs, want=wrong)


def test_queries_that_saw_nothing_gave_nothing():
    inputs = make_inputs(70, 203, dtype=torch.float64)
    want = exact(inputs | {"bounds": bounds(*[(10, 70, 0, 203)] * 2)})
    inputs["lse"][:, :, :10] = -torch.inf
    assert (exact(inputs) - want).abs().max() <= torch.finfo(torch.float64).eps * 70 * want.max()


@kernel
def test_queries_that_saw_nothing_give_nothing_in_the_kernel():
    inputs = make_inputs(70, 203)
    inputs["lse"][:, :, :10] = -torch.inf
    assert_sums(inputs)


def test_what_does_not_fit_is_refused():
    inputs = make_inputs()
    for change, word in [
        ({"lse": inputs["lse"][:, :1]}, "lse must be"),
        ({"k": inputs["k"].double()}, "one floating dtype"),
        ({"reduce": "min"}, "is not one of"),
        ({"impl": "flash"}, "is not one of"),
        ({"bounds": torch.zeros(2, 2, 4, dtype=torch.int32)}, "bounds must be"),
        ({"k": inputs["k"][:, :, :50]}, "at least as many keys"),
        ({"q": inputs["q"][:, :5]}, "are wanted"),
    ]:
        with pytest.raises(ValueError, match=word):
            attn_mass(**inputs | change)


def test_opcheck():
    op = torch.ops.lcpatch_kernels.attn_mass.default
    inputs = make_inputs()
    args = (inputs["q"], inputs["k"], inputs["lse"], bounds((0, 70, 0, 203), (3, 70, 5, 203)), 0.2, 0.0, "sum")
    torch.library.opcheck(op, (*args, "reference"), test_utils=("test_schema", "test_faketensor"))
