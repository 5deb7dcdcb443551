"""The contract that every cache keeps, whatever the schedule; walks the registry."""

import inspect
import random

import pytest
import torch
from cache_cases import ALL, COMPILED, KEEPS_ALL, LENGTH, compiling, feed, left_padding, make, make_model, tensors_of
from models import build, tokens
from noise import distance, model_budget
from odd_models import make as odd_model
from transformers import DynamicCache

from lcpatch.caches import caches
from lcpatch.caches.evicting import EvictingLayer
from lcpatch.core.errors import UnsupportedModelError

CUTS = {
    "whole": [LENGTH],
    "chunks": [30, 1, 1, 28, 30],
    "tokens": [1] * LENGTH,
    "prompt": [50, *[1] * (LENGTH - 50)],
}
SOME_CUTS = ["whole", "chunks", "prompt", pytest.param("tokens", marks=pytest.mark.slow)]
PADS = [0, 37, 11]
SEQUENCES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 2, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "prompt in chunks": {"prefill_chunk_size": 17},
}
every_cache = pytest.mark.parametrize("name", ALL)


# With room for everything it is a full cache.


@every_cache
@pytest.mark.parametrize("cut", SOME_CUTS)
def test_with_room_for_everything_the_logits_are_those_of_a_full_cache(name, cut):
    model = make_model(name)
    ids, mask = tokens(3, LENGTH), left_padding(PADS)
    want = feed(model, ids, DynamicCache(config=model.config), [LENGTH], mask)
    got = feed(model, ids, make(name, model), CUTS[cut], mask)
    assert distance(got[mask.bool()], want[mask.bool()]) <= model_budget(build(), ids)


@every_cache
@pytest.mark.parametrize("how", SEQUENCES)
def test_with_room_for_everything_generate_gives_the_tokens_of_a_full_cache(name, how):
    model = make_model(name)
    ids, mask = tokens(3, 50), left_padding(PADS, 50)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, **SEQUENCES[how]}
    outputs = []
    for cache in (DynamicCache(config=model.config), make(name, model)):
        torch.manual_seed(0)
        outputs.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(*outputs)


@every_cache
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_give_what_a_full_cache_gives(name, seed):
    """Chunks, tokens, steps taken back, rows chosen, reordered and repeated, in any order."""
    rng = random.Random(seed)
    model = make_model(name)
    caches_, rows = (DynamicCache(config=model.config), make(name, model)), list(range(3))
    pads, texts = [rng.choice([0, 0, 5, 40]) for _ in rows], [tokens(1, 200, seed=n)[0] for n in rows]
    seen, budget = 0, model_budget(build(), tokens(1, 200))
    while seen < 150:
        size = rng.choice([1, 1, 1, 2, 7, 33])
        ids = torch.stack([text[seen : seen + size] for text in texts])
        mask = left_padding(pads, seen + size)
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        with torch.no_grad():
            one, other = (
                model(ids, attention_mask=mask, position_ids=position, past_key_values=c).logits for c in caches_
            )
        real = mask[:, seen:].bool()
        assert not real.any() or distance(other[real], one[real]) <= budget
        seen += size
        change = rng.choice(["crop", "select", "reorder", "repeat" if len(texts) < 3 else "crop", None, None])
        if change == "crop" and size < 9 and seen > 60:
            num = rng.randint(1, size)
            seen -= num
            for cache in caches_:
                cache.crop(-num)
        elif change in ("select", "reorder", "repeat"):
            index = torch.tensor([rng.randrange(len(texts)) for _ in range(rng.randint(1, 4))])
            if change == "repeat":
                index = torch.arange(len(texts)).repeat_interleave(2)
            for cache in caches_:
                if change == "repeat":
                    cache.batch_repeat_interleave(2)
                elif change == "reorder":
                    cache.reorder_cache(index)
                else:
                    cache.batch_select_indices(index)
            texts, pads = [texts[n].clone() for n in index], [pads[n] for n in index]
            for text in texts:  # rows that share a past go on differently
                text[seen:] = torch.randint(3, 61, (len(text) - seen,), generator=torch.Generator().manual_seed(seen))
        assert all(cache.get_seq_length() == seen for cache in caches_)


@every_cache
def test_assisted_decoding_with_room_for_everything(name):
    model, assistant = make_model(name), build(seed=3)
    ids = tokens(1, 50)
    want = model.generate(ids, max_new_tokens=25, do_sample=False)
    cache = make(name, model)
    got = model.generate(ids, max_new_tokens=25, do_sample=False, past_key_values=cache, assistant_model=assistant)
    assert torch.equal(got, want)


@every_cache
def test_a_second_turn_with_room_for_everything(name):
    model, cache = make_model(name), None
    cache = make(name, model)
    first = model.generate(tokens(1, 40), max_new_tokens=8, do_sample=False, past_key_values=cache)
    turn = torch.cat([first, tokens(1, 21, seed=9)], 1)
    got = model.generate(turn, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(got, model.generate(turn, max_new_tokens=8, do_sample=False))


@every_cache
def test_autocast(name):
    """Rotary embeddings leave queries in fp32 beside half-precision values."""
    model, ids = make_model(name), tokens(1, 60)
    exact = feed(model, ids, DynamicCache(config=model.config), [60])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = feed(model, ids, DynamicCache(config=model.config), [60]).float()
        ours = feed(model, ids, make(name, model), [40, *[1] * 20]).float()
        feed(model, ids, make(name, model, small=True), [40, *[1] * 20])
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("name", COMPILED)
def test_autocast_compiled(name):
    """What is kept or read hangs on sums that autocast would round, another way in every formula for them."""
    model, ids, graphs = make_model(name), tokens(2, 50), []
    options = {"max_new_tokens": 20, "do_sample": False}
    plain, fixed = (make(name, model, small=True, compiled=compiled) for compiled in (False, True))
    with torch.autocast("cpu", torch.bfloat16):
        want = model.generate(ids, past_key_values=plain, **options)
        got = model.generate(ids, past_key_values=fixed, compile_config=compiling(graphs), **options)
    assert torch.equal(got, want)
    assert len(graphs) == 1


# With little room.


@every_cache
@pytest.mark.parametrize("cut", SOME_CUTS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, cut):
    model = make_model(name)
    ids, mask = tokens(3, LENGTH), left_padding(PADS)
    budget = model_budget(build(), ids)
    got = feed(model, ids, make(name, model, small=True), CUTS[cut], mask)
    for row, pads in enumerate(PADS):
        ends = [max(sum(CUTS[cut][: n + 1]) - pads, 0) for n in range(len(CUTS[cut]))]
        sizes = [b - a for a, b in zip([0, *ends], ends, strict=False) if b > a]
        alone = feed(model, ids[row : row + 1, pads:], make(name, model, small=True), sizes)
        assert distance(got[row : row + 1, pads:], alone) <= budget


@every_cache
@pytest.mark.parametrize("how", ["greedy", "beams, all returned"])
def test_generate_gives_a_batch_what_it_gives_its_rows(name, how):
    model = make_model(name)
    ids, mask = tokens(3, 50), left_padding(PADS, 50)
    options = {"max_new_tokens": 12, "do_sample": False, **SEQUENCES[how]}
    got = model.generate(ids, attention_mask=mask, past_key_values=make(name, model, small=True), **options)
    got = got.unflatten(0, (3, -1))
    for row, pads in enumerate(PADS):
        alone = model.generate(ids[row : row + 1, pads:], past_key_values=make(name, model, small=True), **options)
        assert torch.equal(got[row, :, pads:], alone)


@every_cache
def test_chunks_give_what_one_forward_gives_or_the_cache_says_why_not(name):
    model, ids = make_model(name), tokens(2, LENGTH)
    whole = feed(model, ids, make(name, model, small=True), [LENGTH])
    chunked = feed(model, ids, make(name, model, small=True), CUTS["chunks"])
    same = distance(chunked, whole) <= model_budget(build(), ids)
    assert same == (not caches.get(name).chunks_differ)


@every_cache
def test_memory_is_what_hangs_on_the_layers_and_shrinks_with_the_budget(name):
    model, ids = make_model(name), tokens(2, 300)
    held = {}
    for small in (False, True):
        cache = make(name, model, small)
        feed(model, ids, cache, [250, *[1] * 50])
        real = sum(x.untyped_storage().nbytes() for x in tensors_of(cache.layers).values())
        lists = 512 * len(cache.layers) * len(ids)  # spans, slot lists, marks: a few integers and a bit a page, a row
        assert real - (lists if name != "s2" else 8192) <= sum(cache.memory().values()) <= real
        held[small] = real
    if name not in ("s2", *KEEPS_ALL):
        assert held[True] < held[False] / 3


@every_cache
def test_what_is_on_or_off_takes_no_text(name):
    """Or the text "false" would be True."""
    model, kind = make_model(name), caches.get(name)
    parameters = inspect.signature(kind).parameters.values()
    flags = [p.name for p in parameters if "bool" in str(p.annotation)]
    assert flags or name == "s2"
    for flag in flags:
        with pytest.raises(ValueError, match=f"^{flag}='false' must be True or False$"):
            kind(model, **{flag: "false"})
        with pytest.raises(ValueError, match=f"^{flag}=0 must be True or False$"):
            kind(model, **{flag: 0})


@every_cache
def test_read_is_generate_in_chunks(name):
    """Ahead of generate, padded, and going on where a first turn ended."""
    model = make_model(name)
    ids, mask = tokens(3, 60), left_padding(PADS, 60)
    outputs = []
    for ahead in (False, True):
        cache = make(name, model, small=True)
        options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache}
        if ahead:
            cache.read(ids[:, :45], mask[:, :45], chunk=17)
            assert cache.get_seq_length() == 44
            cache.read(ids, mask, chunk=1000)
        else:
            for part in (slice(0, 17), slice(17, 34), slice(34, 44), slice(44, 59)):
                position = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
                with torch.no_grad():
                    model(
                        ids[:, part], attention_mask=mask[:, : part.stop], position_ids=position, past_key_values=cache
                    )
        outputs.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*outputs)


@every_cache
def test_reset_starts_afresh(name):
    model, ids = make_model(name), tokens(2, LENGTH)
    cache = make(name, model, small=True)
    first = feed(model, ids, cache, CUTS["prompt"])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(model, ids, cache, CUTS["prompt"]), first)


@every_cache
def test_what_inference_mode_filled_is_not_changed_outside_of_it(name):
    model, ids = make_model(name), tokens(2, 52)
    cache = make(name, model, small=True)
    want = feed(model, ids, make(name, model, small=True), [50, 1, 1])
    with torch.inference_mode():
        got = feed(model, ids[:, :51], cache, [50, 1])
    with pytest.raises(RuntimeError, match=r"fill it under torch\.no_grad\(\)"):
        feed(model, ids[:, 51:], cache, [1])
    with torch.inference_mode():
        more = feed(model, ids[:, 51:], cache, [1])
    assert torch.equal(torch.cat([got, more], 1), want)
    cache.reset()
    assert torch.equal(feed(model, ids, cache, [50, 1, 1]), want)


@every_cache
def test_a_small_cache_survives_assistants_turns_and_return_sequences(name):
    """What it gives has no simple definition; that it counts right and keeps its budget does."""
    model, assistant = make_model(name), build(seed=3)
    cache = make(name, model, small=True)
    out = model.generate(
        tokens(1, 50), max_new_tokens=20, do_sample=False, past_key_values=cache, assistant_model=assistant
    )
    turn = torch.cat([out, tokens(1, 30, seed=4)], 1)
    out = model.generate(turn, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert out.shape[1] == 50 + 20 + 30 + 20
    assert cache.get_seq_length() == out.shape[1] - 1
    cache.batch_repeat_interleave(2)
    out = model.generate(
        torch.cat([out, tokens(1, 5, seed=6)], 1).repeat(2, 1), max_new_tokens=5, past_key_values=cache, do_sample=True
    )
    assert cache.get_seq_length() == out.shape[1] - 1


@every_cache
@pytest.mark.parametrize("prefix", ["DiffLlama", "JetMoe"])
def test_a_model_that_attends_to_something_else_than_its_keys_and_values(name, prefix):
    """Halves or copies of them are not what a cache keeps: refused, not generated from."""
    model = make_model(name, odd_model(prefix).eval())
    with pytest.raises(UnsupportedModelError, match="other keys or values than its cache returned"):
        feed(model, tokens(1, LENGTH), make(name, model), [LENGTH])


# Evicting layers: what is kept.


def evicting(name):
    layer = make(name, make_model(name), small=True).layers[0]
    return isinstance(layer, EvictingLayer)


@pytest.mark.parametrize("name", [n for n in ALL if evicting(n)])
def test_what_is_kept_is_sorted_within_the_budget_and_holds_sinks_and_recent_tokens(name):
    model, ids, mask = make_model(name), tokens(3, LENGTH), left_padding(PADS)
    cache = make(name, model, small=True)
    feed(model, ids, cache, CUTS["prompt"], mask)
    for layer in cache.layers:
        position = layer.key_positions()
        for row, pads in enumerate(PADS):
            count = layer.counts[row]
            assert count <= 24
            kept = position[row, :, -count:]
            assert (position[row, :, : layer.slots.length - count] == -1).all()
            assert (kept.diff() > 0).all()
            assert (kept[:, :4] == torch.arange(4)).all()
            assert (kept[:, -1] == LENGTH - 1 - pads).all()
            assert layer.slots.capacity <= 25


@pytest.mark.parametrize("broken", ["bounds", "pads", "counts"])
def test_a_broken_contract_is_seen(broken, monkeypatch):
    """Negative control: without bounds, pads or rows of their own, a batch is not its rows."""
    if broken == "bounds":
        monkeypatch.setattr(EvictingLayer, "bounds", lambda self, num: None)
    elif broken == "pads":
        monkeypatch.setattr(EvictingLayer, "_read_pads", lambda self, bounds, num: None)
    else:
        real = EvictingLayer.best

        def wrong(self, targets):
            return real(self, [max(targets)] * len(targets)).roll(1, 0)

        monkeypatch.setattr(EvictingLayer, "best", wrong)
    with pytest.raises(AssertionError):
        test_a_row_does_not_depend_on_the_rows_beside_it("h2o", "chunks")
