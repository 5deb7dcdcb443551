"""The evicting cache of s2: the same logits as a full cache, whatever the schedule, from the memory that it claims."""

import warnings

import pytest
import torch
from models import build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
from lcpatch.caches import GrowingLayer

LENGTH = 300
PATTERNS = {
    "stripe": {"block_size": 16, "local_blocks": 2, "stride": 3},
    "two sink blocks": {"block_size": 16, "local_blocks": 1, "stride": 4, "sink_blocks": 2},
    "no sinks": {"block_size": 16, "local_blocks": 1, "stride": 2, "sink_blocks": 0},
    "window only": {"block_size": 16, "local_blocks": 3, "stride": None, "sink_blocks": 0},
    "one residue": {"block_size": 32, "local_blocks": 1, "stride": 3, "share": "layer"},
}
CUTS = {
    "whole": [LENGTH],
    "chunks": [100, 1, 1, 48, LENGTH - 150],
    "blocks": [16, 16, 1, LENGTH - 33],
    "tokens": [7] + [1] * (LENGTH - 7),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="s2: .* far blocks are seen by no head")
        yield


def patched(pattern, layers=None, **settings):
    model = build("llama", **settings)
    budget = model_budget(model, tokens(1, LENGTH))
    return lcpatch.apply(model, "s2", layers=layers, **PATTERNS[pattern]), budget


@torch.no_grad()
def feed(model, ids, cache, sizes):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_schedule_gives_the_full_forward(pattern, cut):
    model, budget = patched(pattern)
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    cache = lcpatch.S2Cache(model)
    assert distance(feed(model, ids, cache, CUTS[cut]), want) <= budget
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("pattern", ["stripe", "two sink blocks"])
@pytest.mark.parametrize("layers", [None, "every_2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_gives_the_tokens_of_a_full_cache(pattern, layers, options):
    model, _ = patched(pattern, layers)
    ids, mask = tokens(3, 120), torch.ones(3, 120, dtype=torch.long)
    mask[0, :37], mask[1, :64] = 0, 0
    options = {"max_new_tokens": 70, "do_sample": False, "attention_mask": mask, **options}
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(model.generate(ids, past_key_values=lcpatch.S2Cache(model), **options), want)


def test_chunked_prefill_with_more_pads_than_a_chunk():
    model, _ = patched("stripe")
    ids, mask = tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :67] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": mask}
    want = model.generate(ids, **options)
    got = model.generate(ids, past_key_values=lcpatch.S2Cache(model), prefill_chunk_size=25, **options)
    assert torch.equal(got, want)


def test_assisted_decoding():
    model, _ = patched("stripe")
    assistant = build("llama", seed=3)
    ids = tokens(1, 90)
    want = model.generate(ids, max_new_tokens=60, do_sample=False)
    cache = lcpatch.S2Cache(model)
    got = model.generate(ids, max_new_tokens=60, do_sample=False, past_key_values=cache, assistant_model=assistant)
    assert torch.equal(got, want)


def test_a_second_turn_continues():
    model, _ = patched("stripe")
    cache = lcpatch.S2Cache(model)
    first = model.generate(tokens(1, 100), max_new_tokens=30, do_sample=False, past_key_values=cache)
    turn = torch.cat([first, tokens(1, 33, seed=9)], 1)
    got = model.generate(turn, max_new_tokens=30, do_sample=False, past_key_values=cache)
    assert torch.equal(got, model.generate(turn, max_new_tokens=30, do_sample=False))


def test_stats_count_what_is_kept():
    """300 tokens are 18 blocks of 16 and 12 tokens: 3 blocks and the last one, or 2, and 6 sinks and stripes before."""
    model, _ = patched("window only")
    cache = lcpatch.S2Cache(model)
    assert cache.stats() == {"seen": 0, "kept": 0, "kept_by_layer": {0: 0, 1: 0}, "kept_share": None}
    feed(model, tokens(2, LENGTH), cache, [200, *[1] * 100])
    assert cache.stats() == {"seen": 300, "kept": 60, "kept_by_layer": {0: 60, 1: 60}, "kept_share": 0.2}
    model, _ = patched("stripe", layers=[0])
    cache = lcpatch.S2Cache(model)
    feed(model, tokens(2, LENGTH), cache, [LENGTH])
    assert cache.stats()["kept_by_layer"] == {0: 140, 1: 300}


def test_memory_is_what_the_pattern_keeps():
    """Per KV head: (L + 1) ring pages and one page in V of the rest, plus the sinks, up to the store's grain."""
    model, _ = patched("stripe")
    cache = lcpatch.S2Cache(model)
    feed(model, tokens(1, 500), cache, [500])
    layer, config = cache.layers[0], model.config
    block, ring, far = 16, 3, 1 + -(-(500 // 16) // 3)
    page = 2 * block * config.num_key_value_heads * config.head_dim * 4
    assert layer.memory() <= (ring + far + 16) * page
    assert layer.memory() < 2 * page * 500 // block
    assert cache.memory()["device"] == sum(x.memory() for x in cache.layers)


def test_crop_steps_back_within_a_block_and_refuses_more():
    model, budget = patched("stripe")
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    cache = lcpatch.S2Cache(model)
    feed(model, ids[:, :200], cache, [200])
    cache.crop(-9)
    assert cache.get_seq_length() == 191
    assert distance(feed(model, ids[:, 191:], cache, [50, 59]), want[:, 191:]) <= budget
    with pytest.raises(ValueError, match=r"row 0 would need block \d+ again, which is freed"):
        cache.crop(-60)


def test_reset_starts_afresh():
    model, budget = patched("stripe")
    ids, cache = tokens(1, LENGTH), lcpatch.S2Cache(model)
    first = feed(model, ids, cache, [LENGTH])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert distance(feed(model, ids, cache, [LENGTH]), first) <= budget


def test_what_cannot_work_says_why():
    model = build("llama")
    with pytest.raises(lcpatch.UnsupportedModelError, match=r"lcpatch.apply\(model, 's2'\) first"):
        lcpatch.S2Cache(model)
    for options, word in [({"share": "query_head"}, "share='kv_head'"), ({"num_dense_heads": 1}, "whole blocks")]:
        lcpatch.apply(model, "s2", **PATTERNS["stripe"], **options)
        with pytest.raises(lcpatch.UnsupportedModelError, match=word):
            lcpatch.S2Cache(model)
    lcpatch.apply(model, "s2", mode="train", **PATTERNS["stripe"])
    with pytest.raises(lcpatch.UnsupportedModelError, match="mode='train'"):
        lcpatch.S2Cache(model)
    lcpatch.apply(model, "s2", **PATTERNS["stripe"])
    cache, mask = lcpatch.S2Cache(model), torch.ones(1, 50, dtype=torch.long)
    mask[0, 40:] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model(tokens(1, 50), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("change", ["removed", "patched anew", "another implementation"])
def test_a_model_that_stops_asking_the_cache_is_noticed(change):
    model, _ = patched("stripe")
    cache = lcpatch.S2Cache(model)
    model(tokens(1, 30), past_key_values=cache)
    if change == "removed":
        lcpatch.remove(model)
    elif change == "patched anew":
        lcpatch.apply(model, "s2", **PATTERNS["stripe"])
    else:
        model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="does not ask the cache"):
        model(tokens(1, 1), past_key_values=cache)


def test_a_pattern_that_is_switched_off_is_noticed():
    model, _ = patched("stripe")
    cache = lcpatch.S2Cache(model)
    model(tokens(1, 30), past_key_values=cache)
    for module in model.modules():
        if hasattr(module, "_lcpatch"):
            module._lcpatch.mode = "never"
    with pytest.raises(ValueError, match="not the one that this cache was made for"):
        model(tokens(1, 1), past_key_values=cache)


def test_another_number_of_rows_or_another_mask_is_noticed():
    model, _ = patched("stripe")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :10] = 0
    cache = lcpatch.S2Cache(model)
    model(tokens(2, 50), attention_mask=mask[:, :50], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, the step has 3"):
        model(tokens(3, 1), past_key_values=cache)
    cache = lcpatch.S2Cache(model)
    model(tokens(2, 50), attention_mask=mask[:, :50], past_key_values=cache)
    mask[0, :20] = 0
    with pytest.raises(ValueError, match="began after 10 pads, the mask now hides 20"):
        model(tokens(2, 10), attention_mask=mask, past_key_values=cache)


def test_short_sequences_can_be_cropped_to_nothing():
    model, budget = patched("stripe")
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    cache = lcpatch.S2Cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-40)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert distance(feed(model, ids, cache, [33, 7]), want) <= budget


def test_autocast():
    model, _ = patched("stripe")
    ids = tokens(1, 80)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(ids, use_cache=False).logits
        got = feed(model, ids, lcpatch.S2Cache(model), [70, *[1] * 10])
    rough = build("llama").to(torch.bfloat16)
    lcpatch.apply(rough, "s2", **PATTERNS["stripe"])
    with torch.no_grad():
        scale = distance(rough(ids, use_cache=False).logits.float(), want.float())
    assert distance(got.float(), want.float()) <= scale


def test_layers_with_a_window_keep_their_window():
    model = build("gemma3_text")
    budget = model_budget(model, tokens(1, LENGTH))
    lcpatch.apply(model, "s2", **PATTERNS["stripe"])
    ids, cache = tokens(1, LENGTH), lcpatch.S2Cache(model)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert distance(feed(model, ids, cache, [200, *[1] * 100]), want) <= budget
    assert cache.layers[1].keys.shape[2] < model.config.sliding_window


def test_growing_layer_holds_what_torch_cat_would():
    rng = torch.Generator().manual_seed(0)
    layer, want = GrowingLayer(), None
    for size in [300, 1, 1, 500, 7]:
        new = torch.randn(2, 3, size, 8, generator=rng)
        keys, values = layer.update(new, -new)
        want = new if want is None else torch.cat([want, new], 2)
        assert torch.equal(keys, want)
        assert torch.equal(values, -want)
    layer.crop(-8)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0]))
    assert layer.get_seq_length() == 801
    assert torch.equal(layer.keys, want[[1, 0], :, :801])
