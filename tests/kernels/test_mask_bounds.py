"""Bounds read off dense masks: the same that the tests write by hand, and a refusal of every other mask."""

import pytest
import torch
from models import build, tokens

from lcpatch_kernels import DENSE, BlockSparseSpec, block_sparse
from lcpatch_kernels.mask_bounds import bounds_of


def mask_of(segments: list[list[tuple[int, int, int, int]]], num_queries: int, num_keys: int) -> torch.Tensor:
    """The mask [B, 1, T, S] of each row's segments (q0, q1, k0, k1)."""
    mask = torch.zeros(len(segments), 1, num_queries, num_keys, dtype=torch.bool)
    for row, parts in enumerate(segments):
        for q0, q1, k0, k1 in parts:
            for q in range(q0, q1):
                mask[row, 0, q, k0 : k1 - (q1 - 1 - q)] = True
    return mask


CASES = {
    "plain": ([[(0, 7, 0, 7)]], 7, 7),
    "left and right padding": ([[(3, 7, 3, 7)], [(0, 7, 0, 7)], [(0, 2, 0, 2)]], 7, 7),
    "packed": ([[(0, 3, 0, 3), (3, 4, 3, 4), (4, 9, 4, 9)], [(0, 9, 0, 9)]], 9, 9),
    "packed and padded": ([[(1, 3, 1, 3), (3, 7, 3, 7)]], 9, 9),
    "a chunk after a cache": ([[(0, 3, 0, 8)], [(0, 3, 4, 8)]], 3, 8),
    "one token": ([[(0, 1, 0, 8)], [(0, 1, 5, 8)]], 1, 8),
    "a static cache": ([[(0, 2, 0, 5)], [(0, 2, 2, 5)]], 2, 11),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("additive", [False, True])
def test_bounds_are_read(case: str, additive: bool):
    segments, num_queries, num_keys = CASES[case]
    mask = mask_of(segments, num_queries, num_keys)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    bounds = bounds_of(mask)
    assert bounds.dtype == torch.int32
    for row, parts in enumerate(segments):
        assert [tuple(b) for b in bounds[row].tolist() if b[0] < b[1]] == parts
    assert bounds_of(mask) is bounds
    if not additive:
        mask[:, :, -1, 0] ^= True  # a mask that was changed in place is read anew, and this one is refused
        with pytest.raises(ValueError, match="more than causality"):
            bounds_of(mask)


def test_they_mean_the_mask():
    segments, num_queries, num_keys = CASES["packed and padded"]
    mask = mask_of(segments, num_queries, num_keys)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.float64) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num()
    out, _ = block_sparse(q, k, v, BlockSparseSpec.of([DENSE] * 2), bounds=bounds_of(mask), impl="reference")
    torch.testing.assert_close(out[:, :, 1:7], want[:, :, 1:7], rtol=0, atol=torch.finfo(torch.float64).eps * 64)


PLAIN = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(6, 6, dtype=torch.bool),
        PLAIN.logical_or(torch.arange(6) < 3),
        PLAIN & ~torch.eye(6, dtype=torch.bool).roll(-2, 1),
        PLAIN & (torch.arange(6) != 2),
        PLAIN.triu(-2),
        PLAIN.roll(1, 0),
    ],
    ids=["bidirectional", "prefix", "hole", "pad between", "window", "rolled"],
)
def test_other_masks_are_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match="more than causality"):
        bounds_of(mask[None, None])


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="is not \\[batch, 1, queries, keys\\]"):
        bounds_of(torch.ones(1, 2, 3, 3, dtype=torch.bool))


def test_transformers_own_masks_are_read():
    """What transformers builds for padded rows; its pad rows may see anything."""
    seen = []
    model, ids = build(attn="sdpa"), tokens(2)
    attention = torch.ones_like(ids)
    attention[0, :9] = 0
    module = model.model.layers[0].self_attn
    module.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    model(ids, attention_mask=attention)
    length = ids.shape[1]
    assert bounds_of(seen[0]).tolist() == [[[9, length, 9, length]], [[0, length, 0, length]]]
