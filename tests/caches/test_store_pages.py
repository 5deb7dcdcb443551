"""Pages that lie elsewhere, on disk: what they lost, and what they are known by, is as it was."""

import pytest
import torch
from cache_cases import feed, make, make_model
from models import tokens
from store_cases import continued, rewritten, saved

import lcpatch

APART = {
    "tiered": {},
    "retrieval": {"offload": True},
    "retrieval by bounds": {"offload": True, "scorer": "quest"},
    "retrieval compiled": {"offload": True, "compiled": True},
}
"""Caches whose pages lie elsewhere, in what a codec makes of them."""


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("cut", [0, 9])
@pytest.mark.parametrize("name", APART)
def test_a_file_keeps_what_the_fast_tier_held_and_what_pages_are_known_by(name, codec, cut, tmp_path):
    """Pages that have not lost anything yet, which of them leaves next, and summaries of keys that are gone."""
    _, cache, model, (ids, mask) = saved(name.split()[0], tmp_path, small=True, codec=codec, **APART[name])
    cache.crop(-cut)
    feed(model, ids[:, 80 - cut : 80], cache, [1] * cut, mask[:, :80]) if cut else None
    loaded = lcpatch.load_cache(cache.save(tmp_path / "later.safetensors"), model)
    assert cut or loaded.memory() == cache.memory()  # a generated token's query is held, and not saved
    assert torch.equal(continued(model, loaded, ids, mask), continued(model, cache, ids, mask))
    assert cache.stats()["hit_rate"] < 1


def test_a_broken_table_of_a_tiered_cache_is_refused(tmp_path):
    path, _, model, _ = saved("tiered", tmp_path, small=True, codec="int8")
    for name, value, message in (
        ("page_in", 1 << 40, "full pages of each row"),
        ("page_in", 0, "each once"),
        ("used", -1, "times from 0"),
    ):

        def wrong(held, name=f"0.{name}", value=value):
            return {**held, name: torch.full_like(held[name], value)}

        with pytest.raises(lcpatch.LcpatchError, match=message):
            lcpatch.load_cache(rewritten(path, tensors=wrong), model)


@pytest.mark.parametrize("name", ["retrieval", "tiered"])
def test_a_row_that_reads_fewer_pages_than_are_always_read_is_refused(name, tmp_path):
    path, cache, model, _ = saved(name, tmp_path)
    least = cache.layers[0].reads.least

    def fewer(header):
        header["layers"][0]["numbers"]["budgets"][1] = least - 1
        return header

    with pytest.raises(lcpatch.StoreError, match=f"must each be at least {least} pages"):
        lcpatch.load_cache(rewritten(path, fewer), model)


@pytest.mark.parametrize("name", APART)
def test_pages_that_lie_elsewhere_are_saved_before_one_is_full(name, tmp_path):
    model = make_model(name.split()[0])
    cache = make(name.split()[0], model, small=True, codec="int8", **APART[name])
    feed(model, tokens(1, 3), cache, [3])
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    turn = tokens(1, 40, seed=1)
    assert torch.equal(feed(model, turn, loaded, [1] * 40), feed(model, turn, cache, [1] * 40))


def test_rows_repeated_in_a_fast_tier_of_bytes_are_loaded(tmp_path):
    model, ids = make_model("tiered"), tokens(1, 60)
    page = 2 * 2 * model.config.num_key_value_heads * 4 * model.config.head_dim * 4
    cache = lcpatch.TieredCache(model, gpu_bytes=9 * page, page=4, recent=4)
    feed(model, ids, cache, [60])
    cache.batch_repeat_interleave(3)
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix.safetensors"), model)
    turn = tokens(3, 20, seed=1)
    assert torch.equal(feed(model, turn, loaded, [1] * 20), feed(model, turn, cache, [1] * 20))


@pytest.mark.parametrize("name", ["tiered", "retrieval"])
def test_a_share_of_a_text_that_was_longer_comes_back(name, tmp_path):
    """`crop` leaves the pages that a token reads as many as they were."""
    model, ids = make_model(name), tokens(1, 90)
    cache = make(name, model, budget=0.5, page=4, recent=4)
    feed(model, ids[:, :80], cache, [80])
    cache.crop(-40)
    loaded = lcpatch.load_cache(cache.save(tmp_path / name), model)
    assert loaded.layers[0].budgets == cache.layers[0].budgets == [10]
    assert torch.equal(feed(model, ids, loaded, [1] * 90), feed(model, ids, cache, [1] * 90))
