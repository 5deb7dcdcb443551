"""Soft matching and merging: what always holds of a pass, and the kernels, interpreted, against the definition."""

from __future__ import annotations

import pytest
import torch
from cluster_cases import assert_matches, assert_merges, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch_kernels import cluster_merge
from lcpatch_kernels.block_sparse import has_triton
from lcpatch_kernels.cluster_merge import num_merged

IMPLS = ["reference"]
if has_triton() and not torch.cuda.is_available():  # with a GPU, the kernel is compiled: test_cluster_merge_gpu.py
    IMPLS.append("triton")


@st.composite
def passes(draw):
    """Options of a pass, and a shape that they meet."""
    chunk = 2 * draw(st.integers(1, 20))
    slots = draw(st.integers(1, 90))
    pads = tuple(draw(st.lists(st.integers(0, slots), min_size=1, max_size=3)))
    return {"chunk": chunk, "merges": draw(st.integers(0, chunk // 2))}, slots, pads, draw(st.integers(0, 99))


@settings(max_examples=40)
@given(passes())
def test_a_pass_conserves_tokens_and_values_and_order(case):
    options, slots, pads, seed = case
    k, v, size = make_inputs(slots, pads=pads, head_dim=4, dtype=torch.float64, seed=seed)
    k_out, v_out, n, target = cluster_merge(k, v, size, impl="reference", **options)
    assert n.shape[2] == slots - num_merged(slots, **options) >= slots // 2, "never over 50 % a pass"
    assert torch.equal(n.sum(-1), size.sum(-1))
    before, after = ((x.nan_to_num() * w[..., None]).sum(2) for x, w in ((v, size), (v_out, n)))
    rounding = 4 * slots * torch.finfo(torch.float64).eps * (v.nan_to_num().abs() * size[..., None]).sum(2)
    assert ((before - after).abs() <= rounding).all()
    assert k_out.isfinite().all()
    assert v_out.isfinite().all()
    assert_matches(k, size, *options.values(), target)
    assert_merges((k, v, size), target, (k_out, v_out, n), *options.values())


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_merging_identical_keys_is_exact(num_passes, groups, seed):
    """2^p neighbours that share a key: after p passes softmax(q k + log n) v is what it was."""
    times = 2**num_passes
    k, v, size = make_inputs(groups, pads=(0,), dtype=torch.float64, seed=seed)
    k = k.repeat_interleave(times, 2)
    v = torch.randn(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    size = torch.ones_like(size).repeat_interleave(times, 2)
    q = torch.randn(1, 3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    want = (q @ k.mT).softmax(-1) @ v
    k_out, v_out, n = k, v, size
    for _ in range(num_passes):
        k_out, v_out, n, _ = cluster_merge(k_out, v_out, n, chunk=2, impl="reference")
    assert n.shape[2] == groups
    got = (q @ k_out.mT + n[:, :, None].double().log()).softmax(-1) @ v_out
    scores = (q @ k.mT).abs().max().item()
    assert (got - want).abs().max() <= 8 * torch.finfo(torch.float64).eps * max(scores, k.shape[2]) * v.abs().max()
    n[..., 0] *= 2  # a wrong count must show
    wrong = (q @ k_out.mT + n[:, :, None].double().log()).softmax(-1) @ v_out
    assert groups == 1 or (wrong - want).abs().max() > 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("chunk", "merges", "slots"), [(64, 32, 203), (64, 20, 192), (32, 16, 31), (6, 2, 50), (128, 64, 129), (2, 1, 1)]
)
def test_chunks(impl, chunk, merges, slots):
    k, v, size = make_inputs(slots, pads=(0, min(37, slots), slots // 2))
    *got, target = cluster_merge(k, v, size, chunk=chunk, merges=merges, impl=impl)
    assert_matches(k, size, chunk, merges, target)
    assert_merges((k, v, size), target, tuple(got), chunk, merges)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_half_precision(impl, dtype, head_dim):
    k, v, size = make_inputs(90, head_dim=head_dim, dtype=dtype)
    *got, target = cluster_merge(k, v, size, chunk=64, impl=impl)
    assert_matches(k, size, 64, 32, target)
    assert_merges((k, v, size), target, tuple(got), 64, 32)


@pytest.mark.parametrize("impl", IMPLS)
def test_plain_means(impl):
    k, v, size = make_inputs()
    *got, target = cluster_merge(k, v, size, chunk=32, weighted=False, impl=impl)
    assert_merges((k, v, size), target, tuple(got), 32, 16, weighted=False)
    with pytest.raises(AssertionError):
        assert_merges((k, v, size), target, tuple(got), 32, 16, weighted=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    """A cache hands over views of buffers that are longer than what is filled."""
    k, v, size = make_inputs(80)
    wide = torch.full((2, 3, 200, 32), torch.nan)
    wide[:, :, 50:130] = k
    first, second = (cluster_merge(x, v, size, chunk=32, impl=impl) for x in (k, wide[:, :, 50:130]))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_wrong_match_is_seen():
    k, v, size = make_inputs(64, pads=(0,))
    *_, target = cluster_merge(-k.roll(1, 2), v, size, chunk=32, impl="reference")
    with pytest.raises(AssertionError):
        assert_matches(k, size, 32, 16, target)


def test_what_does_not_fit_is_refused():
    k, v, size = make_inputs(64)
    for change, word in [
        ({"v": v[..., :3]}, r"\[B, K, S, D\]"),
        ({"size": size.double()}, "size must be"),
        ({"chunk": 7}, "must be even"),
        ({"chunk": 8, "merges": 5}, "merges=5 must lie in 0 … 4"),
        ({"impl": "flash"}, "is not one of"),
    ]:
        with pytest.raises(ValueError, match=word):
            cluster_merge(**{"k": k, "v": v, "size": size} | change)
    if "triton" in IMPLS:
        with pytest.raises(ValueError, match="chunks of 512"):
            cluster_merge(k, v, size, chunk=512, impl="triton")


def test_opcheck():
    op = torch.ops.lcpatch_kernels.cluster_merge.default
    torch.library.opcheck(
        op, (*make_inputs(70), 32, 9, True, "reference"), test_utils=("test_schema", "test_faketensor")
    )
