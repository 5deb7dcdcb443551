"""Generating in buffers that never move: the tokens of eviction, or merging, in between, and a step compiled once."""

import math
import re

import pytest
import torch
from cache_cases import compiling, feed, left_padding, tensors_of
from models import build, tokens
from noise import distance, model_budget
from transformers import CompileConfig

import lcpatch
from lcpatch.caches.fixed import Steps
from lcpatch.caches.fixed_slots import room

LENGTH = 110
CUTS = {"prompt": [50, *[1] * 60], "turns": [30, *[1] * 30, 20, *[1] * 30], "tokens": [3, *[1] * 107]}


CACHES = {
    "h2o": (lcpatch.H2OCache, {"budget": 24, "evict_every": 7}),
    "h2o, every step": (lcpatch.H2OCache, {"budget": 24, "evict_every": 1}),
    "h2o, a share": (lcpatch.H2OCache, {"budget": 0.4, "evict_every": 5}),
    "h2o, mean": (lcpatch.H2OCache, {"budget": 24, "evict_every": 3, "score": "mean", "grace": 5}),
    "h2o, decay": (lcpatch.H2OCache, {"budget": 24, "evict_every": 4, "score": "decay", "group": "max"}),
    "sink": (lcpatch.SinkCache, {"budget": 24, "evict_every": 6}),
    "sink, absolute": (lcpatch.SinkCache, {"budget": 24, "positions": "absolute"}),
    "cluster": (lcpatch.ClusterCache, {"budget": 24, "evict_every": 5}),
    "cluster, a share": (lcpatch.ClusterCache, {"budget": 0.4, "evict_every": 3}),
}
SHARES = [name for name in CACHES if name.endswith("a share")]
PADS = {name: [0, 1, 0] for name in SHARES}  # a share needs a prompt in every row


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("cut", ["prompt", "turns", pytest.param("tokens", marks=pytest.mark.slow)])
def test_it_keeps_what_is_kept_without(cut, name):
    model, (kind, options) = build(), CACHES[name]
    ids, mask = tokens(3, LENGTH), left_padding(PADS.get(name, [0, 37, 11]), LENGTH)
    plain, fixed = kind(model, **options), kind(model, compiled=True, **options)
    want = feed(model, ids, plain, CUTS[cut], mask)
    got = feed(model, ids, fixed, CUTS[cut], mask)
    assert all(layer.steps is not None for layer in fixed.layers)
    assert distance(got[mask.bool()], want[mask.bool()]) <= model_budget(model, ids)
    for one, other in zip(fixed.layers, plain.layers, strict=True):
        one.leave_fixed()
        assert torch.equal(one.key_positions(), other.key_positions())
        assert (one.counts, one.intact) == (other.counts, other.intact)
    assert fixed.stats() == {n: x if x is None else pytest.approx(x, rel=1e-5) for n, x in plain.stats().items()}


@pytest.mark.parametrize("name", ["h2o", "sink", "cluster"])
@pytest.mark.parametrize("pads", [[7, 7, 7], [9, 40, 20]])
def test_all_rows_may_begin_with_pads(pads, name):
    """As a tokenizer's `pad_to_multiple_of` makes them: what nobody fills is no slot."""
    model, (kind, options) = build(), CACHES[name]
    options = {**options, "budget": 60}  # more than the prompt, so that nothing else makes room
    ids, mask = tokens(3, LENGTH), left_padding(pads, LENGTH)
    cut, fewest = CUTS["prompt"], min(pads)
    want = feed(model, ids[:, fewest:], kind(model, **options), [cut[0] - fewest, *cut[1:]], mask[:, fewest:])
    got = feed(model, ids, kind(model, compiled=True, **options), cut, mask)[:, fewest:]
    real = mask[:, fewest:].bool()
    assert distance(got[real], want[real]) <= model_budget(model, ids)


def test_a_row_is_filled_up_to_whole_lines():
    assert {most: room(most) for most in (24, 31, 32)} == {24: 32, 31: 32, 32: 48}


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_codecs_that_are_read_as_they_lie(codec):
    model = build()
    ids = tokens(2, LENGTH)
    options = {"budget": 24, "codec": codec}
    plain, fixed = lcpatch.H2OCache(model, **options), lcpatch.H2OCache(model, compiled=True, **options)
    want, got = (feed(model, ids, cache, CUTS["prompt"]) for cache in (plain, fixed))
    whole = feed(model, ids, lcpatch.H2OCache(model, budget=24), CUTS["prompt"])
    assert distance(got, want) < distance(whole, want) / 100


def test_generate_with_beams_turns_and_a_file(tmp_path):
    model, ids = build(), tokens(2, 50)
    options = {"max_new_tokens": 15, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        plain, fixed = lcpatch.H2OCache(model, 24), lcpatch.H2OCache(model, 24, compiled=True)
        first, want = (model.generate(ids, past_key_values=c, **options, **more) for c in (fixed, plain))
        assert torch.equal(first, want)
    turn = torch.cat([want, tokens(2, 9, seed=5)], 1)
    plain, fixed = lcpatch.H2OCache(model, 24), lcpatch.H2OCache(model, 24, compiled=True)
    for cache in (plain, fixed):
        model.generate(ids, past_key_values=cache, **options)
    loaded = lcpatch.load_cache(fixed.save(tmp_path / "prefix"), model)
    assert loaded.options()["compiled"] is True
    want = model.generate(turn, past_key_values=plain, **options)
    assert torch.equal(model.generate(turn, past_key_values=fixed, **options), want)
    assert torch.equal(model.generate(turn, past_key_values=loaded, **options), want)


@pytest.mark.parametrize("name", ["h2o", "sink", "cluster"])
def test_a_turn_after_an_assistants_is_compiled(name):
    """transformers leaves recording on; while it is, nothing is compiled."""
    model, assistant, (kind, given), graphs = build(), build(seed=3), CACHES[name], []
    how, options = compiling(graphs), {"max_new_tokens": 20, "do_sample": False}
    plain, fixed = kind(model, **given), kind(model, compiled=True, **given)
    text = tokens(1, 50)
    # The first turn: with a cache that has read something, transformers' assisted decoding reads that once more.
    want, got = (model.generate(text, past_key_values=c, assistant_model=assistant, **options) for c in (plain, fixed))
    assert torch.equal(got, want)
    assert all(layer.steps is None for layer in fixed.layers)
    for turn in range(2):
        text = torch.cat([got, tokens(1, 9, seed=turn)], 1)
        want = model.generate(text, past_key_values=plain, **options)
        got = model.generate(text, past_key_values=fixed, compile_config=how, **options)
        assert torch.equal(got, want)
        assert all(layer.steps is not None for layer in fixed.layers)
        assert len(graphs) == 1
    one, other = fixed.stats(), plain.stats()
    assert all(one[key] == other[key] for key in ("seen", "kept", "kept_by_layer"))


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_recorded_while_someone_crops_after_each(compiled):
    """Also after those of a single token, where an assistant had nothing to say."""
    model, ids = build(), tokens(1, 60)
    cache = lcpatch.H2OCache(model, 24, compiled=compiled)
    cache.activate_past_recording()
    for start, end in ((0, 50), (50, 51), (51, 52), (52, 56)):
        feed(model, ids[:, start:end], cache, [end - start])
        cache.crop(0)
        assert all(layer.record_past for layer in cache.layers)
    feed(model, ids[:, 56:59], cache, [3])  # a turn's prompt
    assert all(layer.record_past for layer in cache.layers)
    feed(model, ids[:, 59:], cache, [1])
    assert not any(layer.record_past for layer in cache.layers)
    assert cache.stats()["kept"] <= 24


def test_layers_that_keep_different_numbers_are_refused():
    """They share what a step counts."""
    model, ids = build(), tokens(1, 30)
    cache = lcpatch.H2OCache(model, 24, compiled=True)
    feed(model, ids[:, :20], cache, [20])
    cache.layers[1].counts = [19]
    with pytest.raises(ValueError, match=r"layers keep \[19\] and \[20\] tokens"):
        feed(model, ids[:, 20:21], cache, [1])


def addresses(cache):
    """Of all that a graph of the step reads and writes, and what of it a graph would have to copy."""
    every = tensors_of([(layer.steps, layer.slots) for layer in cache.layers]).values()
    assert all(hasattr(x, "_dynamo_static_input_type") for x in every)
    return sorted(x.data_ptr() for x in every)


def test_buffers_do_not_move_and_memory_does_not_grow():
    model, ids = build(), tokens(1, 300)
    cache = lcpatch.H2OCache(model, budget=24, compiled=True)
    feed(model, ids[:, :60], cache, [50, *[1] * 10])
    places, held = addresses(cache), cache.memory()
    feed(model, ids[:, 60:], cache, [1] * 240)
    assert addresses(cache) == places
    assert cache.memory() == held


@pytest.mark.parametrize("name", CACHES)
def test_every_turn_generates_in_the_same_tensors(name):
    """What a CUDA graph recorded holds in the next turn, and nothing is held twice between turns."""
    model, (kind, options) = build(), CACHES[name]
    cache, ids = kind(model, compiled=True, **options | {"budget": 24}), tokens(2, 150)
    turns = [[50, *[1] * 10], [1] * 5, [40, *[1] * 10], [3, *[1] * 10], [1, *[1] * 21]]
    places = set()
    for part, cut in zip(ids.split([sum(cut) for cut in turns], 1), turns, strict=True):
        feed(model, part, cache, cut)
        places.add(tuple(addresses(cache)))
        held = sum(cache.memory().values())
        for layer in cache.layers:
            layer.leave_fixed()
        real = sum(x.untyped_storage().nbytes() for x in tensors_of(cache.layers).values())
        assert sum(cache.memory().values()) == held
        assert held <= real <= held + 512 * len(cache.layers)  # a few integers a row
    assert len(places) == 1


def test_a_budget_that_grew_gets_other_tensors_and_lets_the_old_ones_go():
    model, ids = build(), tokens(1, 300)
    cache = lcpatch.H2OCache(model, 0.4, compiled=True)
    feed(model, ids[:, :100], cache, [90, *[1] * 10])
    feed(model, ids[:, 100:], cache, [190, *[1] * 10])
    assert cache.layers[0].slots.capacity == 128
    real = sum(x.untyped_storage().nbytes() for x in tensors_of(cache.layers).values())
    assert real <= sum(cache.memory().values()) + 512 * len(cache.layers)


@pytest.mark.parametrize("kind", [lcpatch.H2OCache, lcpatch.SinkCache, lcpatch.ClusterCache])
def test_a_budget_that_grew_to_what_just_fills_the_tensors_gets_others(kind):
    """15 tokens of 29 lie in 16 slots; so would 16 of 32, which want one more."""
    model, ids, cut = build(), tokens(1, 52), [29, 1, 2, *[1] * 20]
    plain, fixed = kind(model, 0.5), kind(model, 0.5, compiled=True)
    want, got = (feed(model, ids, cache, cut) for cache in (plain, fixed))
    assert fixed.layers[0].budgets == [16]
    assert distance(got, want) <= model_budget(model, ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lcpatch.H2OCache, lcpatch.SinkCache, lcpatch.ClusterCache])
def test_the_compiled_step_copies_no_keys_and_values(kind):
    """Inductor writes the token into the buffers that the step was given: what it allocates is small beside them."""
    from torch._inductor.utils import run_and_get_code

    model, ids = build(num_hidden_layers=1), tokens(1, 300)
    how = CompileConfig(mode=None, fullgraph=True)
    how._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False}
    cache = kind(model, 200, compiled=True)
    _, codes = run_and_get_code(model.generate, ids, past_key_values=cache, compile_config=how, **options)
    shapes = [eval(shape) for code in codes for shape in re.findall(r"= empty_strided_cpu\((\([^)]*\))", code)]
    buffer = cache.layers[0].slots.tensors["keys"]
    if kind is lcpatch.H2OCache:  # its masses are added to in place, not made anew and copied back
        floats = [
            eval(x) for code in codes for x in re.findall(r"= empty_strided_cpu\((\([^)]*\)).*torch.float32", code)
        ]
        assert tuple(cache.layers[0].slots.tensors["mass"].shape) not in floats
    assert shapes
    assert max(math.prod(shape) for shape in shapes) < buffer.numel() / 4
    assert "index out of bounds" in codes[0], "there is a write by index to be judged"


@pytest.mark.parametrize(("name", "tensors"), [("h2o", 3), ("sink", 2), ("cluster", 3)])
def test_a_step_reads_little_beside_weights_keys_and_values(name, tensors):
    """An input costs a guard each token: a layer adds its keys, values and one vector, all of them two counts."""
    (kind, given), model, ids, inputs = CACHES[name], build(), tokens(2, 50), []
    how = compiling([], inputs)
    options = {"compile_config": how, "max_new_tokens": 4, "do_sample": False}
    model.generate(ids, past_key_values=kind(model, compiled=True, **given), **options)
    weights = {id(x) for x in (*model.parameters(), *model.buffers())}
    others = [x for x in inputs if id(x) not in weights]
    assert len(others) == 2 + 2 + tensors * len(model.model.layers)  # beside token and position


def test_no_mask_is_made_that_no_layer_reads():
    """Ahead of a step, from padding that grows each token."""
    model, ids, mask = build(), tokens(2, 50), left_padding([0, 7], 51)
    cache = lcpatch.H2OCache(model, 24, compiled=True)
    feed(model, ids, cache, [50], mask[:, :50])
    given = {"past_key_values": cache, "attention_mask": mask, "next_sequence_length": 1}
    assert "attention_mask" not in model.prepare_inputs_for_generation(tokens(2, 51), **given)


@pytest.mark.parametrize("name", ["h2o", pytest.param("sink", marks=pytest.mark.slow), "cluster"])
def test_the_decode_step_compiles_once(name):
    """In `generate`, as on a GPU: no graph break, and nothing compiled anew, whatever the length and the cache."""
    (kind, given), model, ids, graphs = CACHES[name], build(), tokens(2, 50), []
    how = compiling(graphs)
    options = {"max_new_tokens": 40, "do_sample": False}
    want = model.generate(ids, past_key_values=kind(model, **given), **options)
    cache = kind(model, compiled=True, **given)
    got = model.generate(ids, past_key_values=cache, compile_config=how, **options)
    assert torch.equal(got, want)
    assert len(graphs) == 1
    turn = torch.cat([got, tokens(2, 13, seed=3)], 1)
    model.generate(turn, past_key_values=cache, compile_config=how, **options)
    assert len(graphs) == 1
    other = kind(model, compiled=True, **given)
    again = model.generate(ids, past_key_values=other, compile_config=how, **options)
    assert torch.equal(again, want)
    assert len(graphs) == 1


def test_the_device_is_waited_for_only_where_there_may_be_no_room(monkeypatch):
    """The host counts announcements instead: one a forward, or several, never fewer than tokens."""
    model, ids, waits = build(), tokens(1, 160), []
    real = Steps.recount
    monkeypatch.setattr(Steps, "recount", lambda self: (waits.append(self.most), real(self)))
    cache = lcpatch.H2OCache(model, 100, evict_every=40, compiled=True)
    with torch.no_grad():
        feed(model, ids[:, :101], cache, [60, *[1] * 41])
        assert waits == []
        for _ in range(500):
            cache.get_mask_sizes(1, 0)
    assert len(waits) < 25, "each count buys as many announcements as there is room for tokens"
    assert cache.get_seq_length() == 101
