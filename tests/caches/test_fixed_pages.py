"""Generating from pages in buffers that never move: the tokens of without, and a step compiled once.

What is a tiered cache's alone, and what a retrieval cache shares with it; its own is in test_fixed_retrieval.py.
"""

import copy
import math
import re

import pytest
import torch
from cache_cases import feed, left_padding, tensors_of
from models import build, tokens
from noise import distance, model_budget
from transformers import CompileConfig

import lcpatch

LENGTH = 130
CUTS = {"prompt": [70, *[1] * 60], "turns": [30, *[1] * 30, 20, *[1] * 50], "tokens": [3, *[1] * 127]}
KINDS = {
    "tiered": (lcpatch.TieredCache, {"budget": 48, "attend": 32, "page": 4, "recent": 4}),
    "retrieval": (lcpatch.RetrievalCache, {"budget": 32, "page": 4, "recent": 4}),
}
CACHES = {
    "plain": {"codec": None},
    "int8": {"codec": "int8"},
    "int4, as much as is held": {"codec": "int4", "attend": None},
    "fp8, a few best": {"codec": "fp8", "top": 3},
    "a share": {"codec": "int4", "budget": 0.4},
    "all of it": {"codec": "int8", "budget": 1 << 20, "attend": None},
    "more best keys than there are": {"codec": None, "top": 2000},
    "pages of two sizes": {"codec": "int8", "page": [4, 2], "budget": 32, "attend": 24},
}
PADS = {"a share": [0, 1, 0]}  # a share needs a prompt in every row


def both(model, kind="tiered", **options):
    cache, small = KINDS[kind]
    given = {**small, **options}
    return cache(model, **given), cache(model, **given, compiled=True)


def how(backend=None, mode=None):
    config = CompileConfig(mode=mode, fullgraph=True, **({"backend": backend} if backend else {}))
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("cut", ["prompt", "turns", pytest.param("tokens", marks=pytest.mark.slow)])
def test_it_reads_and_keeps_what_is_read_and_kept_without(cut, name):
    model = build()
    ids, mask = tokens(3, LENGTH), left_padding(PADS.get(name, [0, 23, 11]), LENGTH)
    plain, fixed = both(model, **CACHES[name])
    want, got = (feed(model, ids, cache, CUTS[cut], mask) for cache in (plain, fixed))
    assert all(layer.steps is not None for layer in fixed.layers)
    assert distance(got[mask.bool()], want[mask.bool()]) <= model_budget(model, ids)
    assert fixed.stats() == plain.stats()
    for one, other in zip(fixed.layers, plain.layers, strict=True):
        assert one.steps is None
        full = max(one.pages.lengths) // one.reads.page
        for name in ("page_in", "used", "slot_of"):
            mine, theirs = (getattr(x.pages.fast.residents, name)[:, 1:] for x in (one, other))
            columns = min(mine.shape[1], theirs.shape[1], *([full] if name == "slot_of" else []))
            assert torch.equal(mine[:, :columns], theirs[:, :columns])
        assert torch.equal(one.pages.fast.residents.clock, other.pages.fast.residents.clock)


def test_a_choice_that_goes_wrong_within_the_step_is_seen(monkeypatch):
    from lcpatch.caches.tree_index import TreeIndex

    real = TreeIndex.fixed_scores
    monkeypatch.setattr(TreeIndex, "fixed_scores", lambda *args: real(*args).roll(1, 1))
    with pytest.raises(AssertionError):
        test_it_reads_and_keeps_what_is_read_and_kept_without("prompt", "plain")


@pytest.mark.parametrize(
    ("kind", "exact", "stored"), [("tiered", {"codec": None}, {"codec": "int8"}), ("retrieval", {}, {})]
)
def test_generate_with_beams_turns_copies_and_a_file(kind, exact, stored, tmp_path):
    model, ids = build(), tokens(2, 70)
    options = {"max_new_tokens": 15, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        plain, fixed = both(model, kind, **exact)
        want, got = (model.generate(ids, past_key_values=c, **options, **more) for c in (plain, fixed))
        assert torch.equal(got, want)
    turn = torch.cat([want, tokens(2, 9, seed=5)], 1)
    plain, fixed = both(model, kind, **stored)
    for cache in (plain, fixed):
        model.generate(ids, past_key_values=cache, **options)
    twin = copy.deepcopy(fixed)
    loaded = lcpatch.load_cache(fixed.save(tmp_path / "prefix"), model)
    assert loaded.options()["compiled"] is True
    want = model.generate(turn, past_key_values=plain, **options)
    for cache in (fixed, twin, loaded):
        assert torch.equal(model.generate(turn, past_key_values=cache, **options), want)


@pytest.mark.parametrize("more", [{}, {"offload": True}])
def test_a_budget_that_a_short_turn_raised_has_its_slots_at_once(more):
    """The turn fills no page, so that nothing else would make room; two pages then shared a slot."""
    kind = "retrieval" if more else "tiered"
    model, ids = build(), tokens(1, 96)
    options = {"budget": 0.6, "page": 8, "recent": 8, "codec": None, **more}
    if kind == "tiered":
        options["attend"] = 4096
    plain, fixed = both(model, kind, **options)
    want, got = (feed(model, ids, cache, [50, *[1] * 35, 2, *[1] * 9]) for cache in (plain, fixed))
    assert plain.layers[0].budgets == [6]
    assert distance(got, want) <= model_budget(model, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_taken_back_and_rows_chosen(kind):
    model, ids = build(), tokens(2, LENGTH)
    plain, fixed = both(model, kind)
    for cache in (plain, fixed):
        feed(model, ids[:, :80], cache, [70, *[1] * 10])
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
    rest = tokens(3, 20, seed=2)
    want, got = (feed(model, rest, cache, [1] * 20) for cache in (plain, fixed))
    assert distance(got, want) <= model_budget(model, ids)
    assert fixed.stats() == plain.stats()


def addresses(cache):
    """Of all that a graph of the step reads and writes."""
    every = [x for layer in cache.layers for x in (*layer.pages.tensors, *layer.index.tensors)]
    assert all(hasattr(x, "_dynamo_static_input_type") for x in every)
    return [x.data_ptr() for x in every]


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_generates_in_the_same_tensors_and_memory_is_told(kind):
    model, ids = build(), tokens(2, 299)
    _, cache = both(model, kind)
    turns, places = [[70, *[1] * 10], [1] * 50, [40, *[1] * 30], [1] * 99], set()
    for part, cut in zip(ids.split([sum(cut) for cut in turns], 1), turns, strict=True):
        feed(model, part, cache, cut)
        places.add(tuple(addresses(cache)))
        cache.reorder_cache(torch.tensor([1, 0]))
        held = sum(cache.memory().values())
        real = sum(x.untyped_storage().nbytes() for x in tensors_of(cache.layers).values())
        assert held <= real <= held + 8192 * len(cache.layers)
    assert len(places) == 1


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("tiered", {"codec": None}),
        ("tiered", {"codec": "int8"}),
        ("retrieval", {}),
        ("retrieval", {"offload": True}),
        ("retrieval", {"offload": True, "codec": "fp8"}),
        ("retrieval", {"scorer": "mean", "group": "softmax"}),
    ],
)
def test_the_decode_step_compiles_once(kind, given):
    """In `generate`, as on a GPU: no graph break, and nothing compiled anew, whatever the length and the cache."""
    model, ids, graphs = build(), tokens(2, 70), []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    options = {"max_new_tokens": 40, "do_sample": False}
    plain, cache = both(model, kind, **given)
    want = model.generate(ids, past_key_values=plain, **options)
    got = model.generate(ids, past_key_values=cache, compile_config=how(backend), **options)
    assert torch.equal(got, want)
    assert len(graphs) == 1
    turn = torch.cat([got, tokens(2, 13, seed=3)], 1)
    model.generate(turn, past_key_values=cache, compile_config=how(backend), **options)
    other = both(model, kind, **given)[1]
    again = model.generate(ids, past_key_values=other, compile_config=how(backend), **options)
    assert torch.equal(again, want)
    assert len(graphs) == 1
    if kind == "retrieval":
        return
    weights = {id(x) for x in (*model.parameters(), *model.buffers())}
    others = [x for x in graphs[0] if id(x) not in weights]
    assert len(others) == 2 + 2 + 4 + 11 * len(model.model.layers)  # token and position, counts, marks, a layer's own


def test_a_row_that_outgrows_the_fast_tier_compiles_anew_with_numbers():
    """It attends to less from then on, which is another shape, and no variable."""
    model, ids, graphs = build(), tokens(1, 30), []

    def backend(graph, inputs):
        graphs.append(graph)
        assert not any(isinstance(x, (int, torch.SymInt)) for x in inputs)
        return graph.forward

    torch._dynamo.reset()
    options = {"max_new_tokens": 60, "do_sample": False}
    plain, cache = both(model, codec="int8")
    want = model.generate(ids, past_key_values=plain, **options)
    got = model.generate(ids, past_key_values=cache, compile_config=how(backend), **options)
    assert torch.equal(got, want)
    assert len(graphs) == 2


@pytest.mark.slow
def test_the_compiled_step_copies_no_pages():
    """Inductor lets the kernels write where the step was given: what it allocates is small beside the fast tier."""
    from torch._inductor.utils import run_and_get_code

    model, ids = build(num_hidden_layers=1), tokens(1, 1000)
    torch._dynamo.reset()
    cache = lcpatch.TieredCache(model, 512, attend=64, page=4, recent=4, codec="int8", compiled=True)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = lcpatch.TieredCache(model, 512, attend=64, page=4, recent=4, codec="int8")
    want = model.generate(ids, past_key_values=plain, **options)
    got, codes = run_and_get_code(model.generate, ids, past_key_values=cache, compile_config=how(), **options)
    assert torch.equal(got, want)
    shapes = [eval(shape) for code in codes for shape in re.findall(r"= empty_strided_cpu\((\([^)]*\))", code)]
    assert shapes
    layer = cache.layers[0]
    assert max(math.prod(shape) for shape in shapes) < layer.pages.fast.data.numel() / 4
    assert all(op in codes[0] for op in ("take_slots", "bring_pages", "index out of bounds"))


@pytest.mark.parametrize("options", [{"disk": "/tmp"}, {"ahead": True}])
def test_what_cannot_be_compiled_says_why(options):
    with pytest.raises(ValueError, match="leave out disk and ahead"):
        lcpatch.TieredCache(build(), compiled=True, **options)
