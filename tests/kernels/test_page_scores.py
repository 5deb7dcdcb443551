"""Pages: the bounds always hold, and the kernels, interpreted, give what the definition gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cases import assert_pages, make_bounds, make_keys, slack, token_scores

from lcpatch_kernels import page_bounds, page_scores
from lcpatch_kernels.block_sparse import has_triton

IMPLS = ["reference"]
if has_triton() and not torch.cuda.is_available():  # with a GPU, the kernel is compiled: test_page_scores_gpu.py
    IMPLS.append("triton")


@st.composite
def rows(draw):
    size, page_size = draw(st.integers(1, 80)), draw(st.integers(1, 40))
    edges = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for _ in range(2)]
    return size, page_size, make_bounds(*edges), draw(st.integers(0, 99))


@settings(max_examples=40)
@given(rows())
def test_the_bounds_hold_always(case):
    """upper >= every q k of the page >= lower, and equal to it where a page has one token; without tokens: -inf."""
    size, page_size, bounds, seed = case
    q, k = make_keys(size, head_dim=8, dtype=torch.float64, seed=seed)
    low, high, _ = page_bounds(k, page_size, bounds=bounds, impl="reference")
    upper, lower = (page_scores(q, low, high, kind=kind, impl="reference") for kind in ("upper", "lower"))
    scores = token_scores(q, k)
    for row, (k0, k1) in enumerate(bounds.tolist()):
        for page in range(low.shape[2]):
            tokens = range(max(k0, page * page_size), min(k1, (page + 1) * page_size))
            if not len(tokens):
                assert (upper[row, :, page] == -torch.inf).all()
                assert (lower[row, :, page] == -torch.inf).all()
                continue
            here = scores[row, :, tokens.start : tokens.stop]
            assert (upper[row, :, page] >= here.amax(-1) - slack(q, k)).all()
            assert (lower[row, :, page] <= here.amin(-1) + slack(q, k)).all()
            if len(tokens) == 1:
                assert (upper[row, :, page] - here[:, 0]).abs().max() <= slack(q, k)


def test_neither_a_mean_nor_one_key_is_a_bound():
    q, k = make_keys(200, dtype=torch.float64)
    most = token_scores(q, k).unflatten(-1, (100, 2)).amax(-1)
    _, _, mean = page_bounds(k, 2, impl="reference")
    first, _, _ = page_bounds(k[:, :, ::2], 1, impl="reference")
    assert (page_scores(q, mean, impl="reference") < most).all()
    assert (page_scores(q, first, first, impl="reference") < most).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("size", "page_size"), [(203, 64), (64, 64), (1, 5), (50, 7)])
def test_sizes(impl, size, page_size):
    q, k = make_keys(size)
    assert_pages(q, k, page_size, None, impl)
    assert_pages(q, k, page_size, make_bounds((0, size), (size // 3, size)), impl)
    assert_pages(q, k, page_size, make_bounds((size, size), (size - 1, size)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (9, 3, 80), (32, 1, 16)])
def test_half_precision_and_groups(impl, dtype, heads, kv_heads, head_dim):
    q, k = make_keys(90, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    assert_pages(q, k, 16, make_bounds((0, 90), (41, 90)), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_pads_that_are_nan(impl):
    q, k = make_keys(80)
    wide = torch.full((2, 3, 200, 32), torch.nan)
    wide[:, :, 50:130] = k
    want = page_bounds(k, 16, bounds=make_bounds((0, 80), (33, 80)), impl="reference")
    wide[1, :, 50:83] = torch.nan
    got = page_bounds(wide[:, :, 50:130], 16, bounds=make_bounds((0, 80), (33, 80)), impl=impl)
    assert all(torch.equal(g, w) for g, w in zip(got[:2], want[:2], strict=True))
    assert got[2].isfinite().all()
    assert torch.equal(page_scores(q, *got[:2], impl=impl), page_scores(q, *want[:2], impl=impl))


def test_what_does_not_fit_is_refused():
    q, k = make_keys(64)
    low, high, _ = page_bounds(k, 16)
    for call, word in [
        (lambda: page_bounds(k[0], 16), r"\[B, K, S, D\]"),
        (lambda: page_bounds(k, 0), "page_size=0"),
        (lambda: page_bounds(k, 16, bounds=torch.zeros(2, 2)), "bounds must be"),
        (lambda: page_bounds(k, 16, impl="flash"), "is not one of"),
        (lambda: page_scores(q.repeat(1, 1, 2, 1), low, high), r"\[B, H, 1, D\]"),
        (lambda: page_scores(q[:, :5], low, high), "do not fit together"),
        (lambda: page_scores(q, low, high.half()), "high must be"),
        (lambda: page_scores(q, low, high, kind="middle"), "kind='middle' is not one of"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()


def test_opcheck():
    q, k = make_keys(64)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.lcpatch_kernels
    torch.library.opcheck(ops.page_bounds.default, (k, 24, make_bounds((0, 64), (3, 9)), "reference"), test_utils=tests)
    low, high, _ = page_bounds(k, 16)
    torch.library.opcheck(ops.page_scores.default, (q, low, high, True, "reference"), test_utils=tests)
    torch.library.opcheck(ops.page_scores.default, (q, low, None, False, "reference"), test_utils=tests)
