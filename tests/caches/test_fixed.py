"""Generating in buffers that never move: the tokens of eviction after every step, and a step that compiles once."""

import pytest
import torch
from cache_cases import feed, left_padding
from models import build, tokens
from noise import distance, model_budget
from transformers import CompileConfig

import lcpatch

LENGTH = 110
CUTS = {"prompt": [50, *[1] * 60], "turns": [30, *[1] * 30, 20, *[1] * 30], "tokens": [3, *[1] * 107]}


CACHES = {
    "h2o": (lcpatch.H2OCache, {"budget": 24}),
    "h2o, a share": (lcpatch.H2OCache, {"budget": 0.4}),
    "h2o, mean": (lcpatch.H2OCache, {"budget": 24, "score": "mean", "grace": 5}),
    "sink": (lcpatch.SinkCache, {"budget": 24}),
    "sink, absolute": (lcpatch.SinkCache, {"budget": 24, "positions": "absolute"}),
}


PADS = {"h2o, a share": [0, 1, 0]}  # a share needs a prompt in every row


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("cut", ["prompt", "turns", pytest.param("tokens", marks=pytest.mark.slow)])
def test_it_keeps_what_eviction_after_every_step_keeps(cut, name):
    model, (kind, options) = build(), CACHES[name]
    ids, mask = tokens(3, LENGTH), left_padding(PADS.get(name, [0, 37, 11]), LENGTH)
    plain, fixed = kind(model, evict_every=1, **options), kind(model, compiled=True, **options)
    want = feed(model, ids, plain, CUTS[cut], mask)
    got = feed(model, ids, fixed, CUTS[cut], mask)
    assert all(layer.fixed is not None for layer in fixed.layers)
    assert distance(got[mask.bool()], want[mask.bool()]) <= model_budget(model, ids)
    assert fixed.stats() == plain.stats()
    for one, other in zip(fixed.layers, plain.layers, strict=True):
        one.leave_fixed()
        assert torch.equal(one.key_positions(), other.key_positions())
        assert one.counts == other.counts


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_codecs_that_are_read_as_they_lie(codec):
    model = build()
    ids = tokens(2, LENGTH)
    options = {"budget": 24, "codec": codec}
    plain, fixed = lcpatch.H2OCache(model, evict_every=1, **options), lcpatch.H2OCache(model, compiled=True, **options)
    want, got = (feed(model, ids, cache, CUTS["prompt"]) for cache in (plain, fixed))
    whole = feed(model, ids, lcpatch.H2OCache(model, budget=24, evict_every=1), CUTS["prompt"])
    assert distance(got, want) < distance(whole, want) / 100


def test_generate_with_beams_turns_and_a_file(tmp_path):
    model, ids = build(), tokens(2, 50)
    options = {"max_new_tokens": 15, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        plain, fixed = lcpatch.H2OCache(model, 24, evict_every=1), lcpatch.H2OCache(model, 24, compiled=True)
        first, want = (model.generate(ids, past_key_values=c, **options, **more) for c in (fixed, plain))
        assert torch.equal(first, want)
    turn = torch.cat([want, tokens(2, 9, seed=5)], 1)
    plain, fixed = lcpatch.H2OCache(model, 24, evict_every=1), lcpatch.H2OCache(model, 24, compiled=True)
    for cache in (plain, fixed):
        model.generate(ids, past_key_values=cache, **options)
    loaded = lcpatch.load_cache(fixed.save(tmp_path / "prefix"), model)
    assert loaded.options()["compiled"] is True
    want = model.generate(turn, past_key_values=plain, **options)
    assert torch.equal(model.generate(turn, past_key_values=fixed, **options), want)
    assert torch.equal(model.generate(turn, past_key_values=loaded, **options), want)


def test_buffers_do_not_move_and_memory_does_not_grow():
    model, ids = build(), tokens(1, 300)
    cache = lcpatch.H2OCache(model, budget=24, compiled=True)
    feed(model, ids[:, :60], cache, [50, *[1] * 10])
    places = [x.data_ptr() for layer in cache.layers for x in layer.fixed.slots.tensors.values()]
    held = cache.memory()
    feed(model, ids[:, 60:], cache, [1] * 240)
    assert [x.data_ptr() for layer in cache.layers for x in layer.fixed.slots.tensors.values()] == places
    assert cache.memory() == held


@pytest.mark.parametrize("kind", [lcpatch.H2OCache, pytest.param(lcpatch.SinkCache, marks=pytest.mark.slow)])
def test_the_decode_step_compiles_once(kind):
    """In `generate`, as on a GPU: no graph break, and nothing compiled anew, whatever the length and the cache."""
    model, ids, graphs = build(), tokens(2, 50), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    how = CompileConfig(backend=backend, mode=None, fullgraph=True)
    how._compile_all_devices = True
    options = {"max_new_tokens": 40, "do_sample": False}
    want = model.generate(ids, past_key_values=kind(model, 24, evict_every=1), **options)
    cache = kind(model, 24, compiled=True)
    got = model.generate(ids, past_key_values=cache, compile_config=how, **options)
    assert torch.equal(got, want)
    assert len(graphs) == 1
    turn = torch.cat([got, tokens(2, 13, seed=3)], 1)
    model.generate(turn, past_key_values=cache, compile_config=how, **options)
    assert len(graphs) == 1
    other = kind(model, 24, compiled=True)
    again = model.generate(ids, past_key_values=other, compile_config=how, **options)
    assert torch.equal(again, want)
    assert len(graphs) == 1
