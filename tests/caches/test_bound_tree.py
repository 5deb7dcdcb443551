"""The tree of bounds never drops a page that holds one of the best keys, and does drop most of the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch.caches.tree import BoundTree


def keys(length: int, seed: int, batch: int = 2, heads: int = 2, dim: int = 8) -> torch.Tensor:
    """Keys that drift, so that pages differ: a random walk."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, dim, generator=rng).cumsum(2) / 4


def best(q: torch.Tensor, k: torch.Tensor, pads: torch.Tensor | None, top: int) -> list[tuple[int, int, int]]:
    """`(row, KV head, position)` of every query head's `top` best keys, in float64."""
    scores = torch.einsum("bkgd,bksd->bkgs", q[:, :, 0].double().unflatten(1, (k.shape[1], -1)), k.double())
    if pads is not None:
        hidden = torch.arange(k.shape[2]) < pads[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    values, index = scores.topk(min(top, k.shape[2]), -1)
    return [
        (b, h, int(s))
        for b in range(k.shape[0])
        for h in range(k.shape[1])
        for s in index[b, h][values[b, h].isfinite()]
    ]


@st.composite
def growths(draw):
    """How keys arrive, how many pads come first, and how many are asked for."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 7, 40, 130]), min_size=1, max_size=6))
    pads = draw(st.none() | st.tuples(st.integers(0, sum(sizes)), st.integers(0, sum(sizes))))
    return sizes, pads, draw(st.integers(1, 40)), draw(st.sampled_from([2, 5])), draw(st.integers(0, 999))


@settings(max_examples=40, deadline=None)
@given(growths())
def test_the_search_gives_a_superset_of_the_best(case):
    sizes, pads, top, leaf, seed = case
    k = keys(sum(sizes), seed)
    pads = None if pads is None else torch.tensor(pads)
    tree = BoundTree(leaf, pads)
    for part in k.split(sizes, 2):
        tree.append(part)
    q = torch.randn(2, 6, 1, 8, generator=torch.Generator().manual_seed(seed + 1))
    leaves, upper = tree.search(q, top)
    found = [[set(leaves[b, h].tolist()) - {-1} for h in range(2)] for b in range(2)]
    for b, h, s in best(q, k, pads, top):
        assert s // leaf in found[b][h]
    assert torch.equal(upper.isinf(), leaves < 0)
    for b, h in ((0, 0), (1, 1)):
        first = 0 if pads is None else int(pads[b])
        assert all(first < (n + 1) * leaf and n * leaf < k.shape[2] for n in found[b][h]), "no page of pads"


def test_most_pages_are_dropped_and_none_by_mistake():
    """2,000 leaves of a drifting text: a few hold the best keys; and the proof needs the right bounds."""
    k = keys(4000, 3, batch=1)
    tree = BoundTree(2)
    tree.append(k)
    q = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    leaves, _ = tree.search(q, 16)
    wanted = {(b, h, s // 2) for b, h, s in best(q, k, None, 16)}
    assert leaves.shape[2] < 200
    low, high = tree.levels[0]
    tree.levels[0] = (low.roll(7, 2), high.roll(7, 2))
    wrong, _ = tree.search(q, 16)
    assert not wanted <= {(0, h, n) for h in range(2) for n in wrong[0, h].tolist()}


def test_more_than_there_are_gives_all():
    tree = BoundTree(4)
    tree.append(keys(41, 0))
    leaves, _ = tree.search(torch.randn(2, 2, 1, 8), 100)
    assert torch.equal(leaves, torch.arange(11).expand(2, 2, -1))


@pytest.mark.parametrize("length", [0, 1, 37, 64])
def test_crop_and_rows(length):
    k = keys(150, 5)
    tree = BoundTree(4, torch.tensor([0, 9]))
    tree.append(k)
    tree.crop(length)
    tree.append(k[:, :, length:])
    tree.select_rows(torch.tensor([1, 1, 0]))
    fresh = BoundTree(4, torch.tensor([9, 9, 0]))
    fresh.append(k[[1, 1, 0]])
    q = torch.randn(3, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    leaves, _ = tree.search(q, 5)
    for b, h, s in best(q, k[[1, 1, 0]], fresh.pads, 5):
        assert s // 4 in leaves[b, h]
    if length % 4 == 0:  # no leaf was cut, so every bound is what it would have been
        for level in zip(tree.levels, fresh.levels, strict=True):
            assert all(torch.equal(a[:, :, :38], b[:, :, :38]) for a, b in zip(*level, strict=True))
