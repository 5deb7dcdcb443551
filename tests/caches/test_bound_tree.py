"""The tree of bounds never drops a page that holds one of the best keys, and does drop most of the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch.caches.tree import BoundTree

ROWS, HEADS, DIM = 2, 2, 8


def keys(length: int, seed: int, rows: int = ROWS) -> torch.Tensor:
    """Keys that drift, so that pages differ: a random walk."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, length, DIM, generator=rng).cumsum(2) / 4


def query(seed: int, rows: int = ROWS, heads: int = 6) -> torch.Tensor:
    return torch.randn(rows, heads, 1, DIM, generator=torch.Generator().manual_seed(seed))


def best(q: torch.Tensor, k: torch.Tensor, row: int, length: int, top: int) -> list[tuple[int, int]]:
    """`(KV head, position)` of every query head's `top` best of the row's first `length` keys, in float64."""
    scores = torch.einsum("kgd,ksd->kgs", q[row, :, 0].double().unflatten(0, (HEADS, -1)), k[row, :, :length].double())
    index = scores.topk(min(top, length), -1).indices
    return [(h, int(s)) for h in range(HEADS) for s in index[h].flatten()]


def search(tree: BoundTree, q: torch.Tensor, top: int) -> torch.Tensor:
    """The pages that are not ruled out, -1 in place of the others."""
    pages, upper = tree.search(q, [top] * q.shape[0])
    return pages.masked_fill(upper.isinf(), -1)


@st.composite
def growths(draw):
    """How many pages come at a time and to which rows, how many keys are asked for, and how the tree is built."""
    steps = draw(st.lists(st.tuples(st.sampled_from([1, 1, 3, 20, 70]), st.booleans()), min_size=1, max_size=5))
    widest = draw(st.sampled_from([None, None, 4, 1000]))
    return steps, draw(st.integers(1, 40)), draw(st.sampled_from([2, 5])), widest, draw(st.integers(0, 999))


@settings(max_examples=25)
@given(growths())
def test_the_search_gives_a_superset_of_the_best(case):
    steps, top, leaf, widest, seed = case
    k, tree = keys(500 * leaf, seed), BoundTree(leaf, ROWS, widest)
    for pages, alone in steps:  # the second row now and then gets more than the first
        groups = [[1]] if alone else [[0, 1]] if tree.leaves[0] == tree.leaves[1] else [[0], [1]]
        for rows in groups:
            begin = tree.leaves[rows[0]] * leaf
            tree.append(k[rows, :, begin : begin + pages * leaf], rows)
    q = query(seed + 1)
    pages = search(tree, q, top)
    for row in range(ROWS):
        found = [set(pages[row, h].tolist()) - {-1} for h in range(HEADS)]
        assert all(n < tree.leaves[row] for n in set.union(*found))
        for h, s in best(q, k, row, tree.leaves[row] * leaf, top):
            assert s // leaf in found[h]


def test_most_pages_are_dropped_and_none_by_mistake():
    """2,000 pages of a drifting text: a few hold the best keys; and the proof needs the right bounds."""
    k, tree = keys(4000, 3, rows=1), BoundTree(2, 1)
    tree.append(k, [0])
    q = query(0, rows=1, heads=2)
    pages = search(tree, q, 16)
    wanted = {(h, s // 2) for h, s in best(q, k, 0, 4000, 16)}
    assert (pages >= 0).sum(-1).max() < 200
    low, high = tree.levels[0]
    tree.levels[0] = (low.roll(7, 2), high.roll(7, 2))
    wrong = search(tree, q, 16)
    assert not wanted <= {(h, n) for h in range(HEADS) for n in wrong[0, h].tolist()}


def test_more_than_there_are_gives_all():
    tree = BoundTree(4, 2)
    tree.append(keys(44, 0), [0, 1])
    pages = search(tree, query(0), 100)
    assert torch.equal(pages, torch.arange(11).expand(2, HEADS, -1))


@pytest.mark.parametrize("kept", [0, 1, 9, 16, 37])
def test_cut_and_rows(kept):
    """A row that steps back and goes on is as if it had not, whoever stands beside it."""
    k, tree = keys(4 * 150, 5), BoundTree(4, 2)
    tree.append(k, [0, 1])
    tree.cut(1, kept)
    assert all(n < max(kept, 1) for n in search(tree, query(1), 3)[1].flatten().tolist())
    tree.append(k[[1], :, 4 * kept :], [1])
    tree.select_rows([1, 1, 0])
    fresh = BoundTree(4, 3)
    fresh.append(k[[1, 1, 0]], [0, 1, 2])
    assert all(
        torch.equal(a, b) for x, y in zip(tree.levels, fresh.levels, strict=True) for a, b in zip(x, y, strict=True)
    )
