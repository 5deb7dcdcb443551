"""Retrieving in buffers that never move: the tokens of without, and a step compiled once."""

from functools import partial

import pytest
import test_fixed_pages
import torch
from cache_cases import feed, left_padding
from models import build, tokens
from noise import distance, model_budget
from test_fixed_pages import CUTS, LENGTH

import lcpatch
from lcpatch.caches.scorer_index import ScorerIndex
from lcpatch.caches.scorers import Bookmarks

CACHES = {
    "quest": {"scorer": "quest"},
    "mean": {"scorer": "mean"},
    "softmax of groups": {"scorer": "mean", "group": "softmax"},
    "offloaded": {"offload": True},
    "offloaded int8": {"offload": True, "codec": "int8"},
    "offloaded int4, by bounds": {"offload": True, "codec": "int4", "scorer": "quest"},
    "a share": {"budget": 0.4},
    "all of it": {"budget": 1 << 20},
    "longer pages": {"page": 16, "budget": 64},
}
PADS = {"a share": [0, 1, 0]}  # a share needs a prompt in every row

both = partial(test_fixed_pages.both, kind="retrieval")


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("cut", ["prompt", "turns", pytest.param("tokens", marks=pytest.mark.slow)])
def test_it_reads_what_is_read_without(cut, name):
    model = build()
    ids, mask = tokens(3, LENGTH), left_padding(PADS.get(name, [0, 23, 11]), LENGTH)
    plain, fixed = both(model, **CACHES[name])
    want, got = (feed(model, ids, cache, CUTS[cut], mask) for cache in (plain, fixed))
    assert all(layer.steps is not None for layer in fixed.layers)
    budget = model_budget(model, ids)
    assert distance(got[mask.bool()], want[mask.bool()]) <= budget
    assert fixed.stats() == plain.stats()
    for one, other in zip(fixed.layers, plain.layers, strict=True):
        for mine, theirs in zip(one.index.summary, other.index.summary, strict=True):
            for row, length in enumerate(one.pages.lengths):
                full = length // one.reads.page
                assert distance(mine[row, :, :full], theirs[row, :, :full]) <= budget


def test_trained_bookmarks_are_read_within_the_step():
    model, ids = build(), tokens(2, LENGTH)
    config = model.config
    bookmarks = Bookmarks(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    for x in bookmarks.parameters():
        torch.nn.init.normal_(x.data)
    plain, fixed = both(model, scorer=bookmarks)
    want, got = (feed(model, ids, cache, CUTS["prompt"]) for cache in (plain, fixed))
    assert distance(got, want) <= model_budget(model, ids)
    assert distance(feed(model, ids, both(model, scorer="mean")[1], CUTS["prompt"]), want) > model_budget(model, ids)


def test_a_page_that_is_not_summed_up_is_seen(monkeypatch):
    monkeypatch.setattr(ScorerIndex, "put", lambda *args: None)
    with pytest.raises(AssertionError):
        test_it_reads_what_is_read_without("prompt", "quest")


@pytest.mark.parametrize("page", [4, 16])
def test_pages_that_fill_do_not_end_the_steps(page):
    """Only where they must be sent home: a device's own pages are summed up within the step."""
    model, ids = build(), tokens(1, 70 + 3 * page)
    for options, left in (({}, 0), ({"offload": True}, 3)):
        _, cache = both(model, page=page, budget=128, **options)
        layer = cache.layers[0]
        feed(model, ids[:, :71], cache, [70, 1])
        times, real = [], layer.leave_fixed
        layer.leave_fixed = lambda times=times, real=real: (times.append(1), real())[1]
        feed(model, ids[:, 71:], cache, [1] * (3 * page - 1))
        assert len(times) == left


def test_dense_layers_are_not_compiled():
    with pytest.raises(ValueError, match="dense_layers=2 grow with every token"):
        lcpatch.RetrievalCache(build(), dense_layers=2, compiled=True)
