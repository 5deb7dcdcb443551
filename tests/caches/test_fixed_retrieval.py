"""Retrieving in buffers that never move: the tokens of without, and a step compiled once."""

import copy

import pytest
import torch
from cache_cases import feed, left_padding, tensors_of
from models import build, tokens
from noise import distance, model_budget
from test_fixed_pages import CUTS, LENGTH, how

import lcpatch
from lcpatch.caches.retrieval import ScorerIndex
from lcpatch.caches.scorers import Bookmarks

SMALL = {"budget": 32, "page": 4, "recent": 4}
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


def both(model, **options):
    given = {**SMALL, **options}
    return lcpatch.RetrievalCache(model, **given), lcpatch.RetrievalCache(model, **given, compiled=True)


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


def test_generate_with_beams_turns_copies_and_a_file(tmp_path):
    model, ids = build(), tokens(2, 70)
    options = {"max_new_tokens": 15, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        plain, fixed = both(model)
        want, got = (model.generate(ids, past_key_values=c, **options, **more) for c in (plain, fixed))
        assert torch.equal(got, want)
    turn = torch.cat([want, tokens(2, 9, seed=5)], 1)
    plain, fixed = both(model)
    for cache in (plain, fixed):
        model.generate(ids, past_key_values=cache, **options)
    twin = copy.deepcopy(fixed)
    loaded = lcpatch.load_cache(fixed.save(tmp_path / "prefix"), model)
    assert loaded.options()["compiled"] is True
    want = model.generate(turn, past_key_values=plain, **options)
    for cache in (fixed, twin, loaded):
        assert torch.equal(model.generate(turn, past_key_values=cache, **options), want)


def test_steps_are_taken_back_and_rows_chosen():
    model, ids = build(), tokens(2, LENGTH)
    plain, fixed = both(model)
    for cache in (plain, fixed):
        feed(model, ids[:, :80], cache, [70, *[1] * 10])
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
    rest = tokens(3, 20, seed=2)
    want, got = (feed(model, rest, cache, [1] * 20) for cache in (plain, fixed))
    assert distance(got, want) <= model_budget(model, ids)
    assert fixed.stats() == plain.stats()


def test_every_turn_generates_in_the_same_tensors_and_memory_is_told():
    model, ids = build(), tokens(2, 299)
    _, cache = both(model)
    turns, places = [[70, *[1] * 10], [1] * 50, [40, *[1] * 30], [1] * 99], set()
    for part, cut in zip(ids.split([sum(cut) for cut in turns], 1), turns, strict=True):
        feed(model, part, cache, cut)
        every = [x for layer in cache.layers for x in (*layer.pages.tensors, *layer.index.tensors)]
        assert all(hasattr(x, "_dynamo_static_input_type") for x in every)
        places.add(tuple(x.data_ptr() for x in every))
        cache.reorder_cache(torch.tensor([1, 0]))
        held = sum(cache.memory().values())
        real = sum(x.untyped_storage().nbytes() for x in tensors_of(cache.layers).values())
        assert held <= real <= held + 8192 * len(cache.layers)
    assert len(places) == 1


@pytest.mark.parametrize(
    "options", [{}, {"offload": True}, {"offload": True, "codec": "fp8"}, {"scorer": "mean", "group": "softmax"}]
)
def test_the_decode_step_compiles_once(options):
    """In `generate`, as on a GPU: no graph break, and nothing compiled anew, whatever the length and the cache."""
    model, ids, graphs = build(), tokens(2, 70), []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    given = {"max_new_tokens": 40, "do_sample": False}
    plain, cache = both(model, **options)
    want = model.generate(ids, past_key_values=plain, **given)
    got = model.generate(ids, past_key_values=cache, compile_config=how(backend), **given)
    assert torch.equal(got, want)
    turn = torch.cat([got, tokens(2, 13, seed=3)], 1)
    model.generate(turn, past_key_values=cache, compile_config=how(backend), **given)
    other = both(model, **options)[1]
    assert torch.equal(model.generate(ids, past_key_values=other, compile_config=how(backend), **given), want)
    assert len(graphs) == 1


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
