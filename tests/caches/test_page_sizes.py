"""Pages of another size in every layer, and the measurement that chooses them."""

import pytest
import torch
from cache_cases import feed, left_padding, randn
from models import attention_outputs, build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
from lcpatch.caches.page_sizes import _Probe, recall_by_page
from lcpatch.caches.reads import Reads
from lcpatch.caches.tiered import page_sizes
from lcpatch.hf.state import own_spec
from lcpatch.hf.watch import Call

OWN = {"page": [4, 8], "recent": 4, "codec": None}
LENGTH = 70
CUT = [60, *[1] * 10]
SIZES = {"pages": (4, 16), "recent": 4, "queries": 6}


def test_with_room_for_everything_the_tokens_are_those_of_a_full_cache():
    model, ids, mask = build(), tokens(3, 50), left_padding([0, 37, 11], 50)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(model.generate(ids, past_key_values=lcpatch.TieredCache(model, 4096, **OWN), **options), want)


def test_each_layer_reads_pages_of_its_own_size():
    model, ids = build(), tokens(2, LENGTH)
    cache = lcpatch.TieredCache(model, 48, **OWN)
    got = feed(model, ids, cache, CUT)
    assert [layer.pages.page for layer in cache.layers] == [4, 8]
    outs = {}
    for page in (4, 8):  # the first layer's output depends on nothing but its own pages
        same = lcpatch.TieredCache(model, 48, **{**OWN, "page": page})
        feed(model, ids[:, :-1], same, CUT[:-1])
        outs[page] = attention_outputs(model, lambda same=same: feed(model, ids[:, -1:], same, [1]))[0]
    mixed = lcpatch.TieredCache(model, 48, **OWN)
    feed(model, ids[:, :-1], mixed, CUT[:-1])
    mine = attention_outputs(model, lambda: feed(model, ids[:, -1:], mixed, [1]))[0]
    assert torch.equal(mine, outs[4])
    assert not torch.equal(outs[4], outs[8])
    alone = feed(model, ids[1:], lcpatch.TieredCache(model, 48, **OWN), CUT)
    assert distance(got[1:], alone) <= model_budget(model, ids)


def test_a_file_keeps_the_sizes(tmp_path):
    model, ids = build(), tokens(2, LENGTH)
    cache = lcpatch.TieredCache(model, 48, **{**OWN, "page": (4, 8)})
    feed(model, ids[:, :65], cache, [60, *[1] * 5])
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    assert [layer.pages.page for layer in loaded.layers] == [4, 8]
    assert torch.equal(*(feed(model, ids[:, 65:], x, [1] * 5) for x in (cache, loaded)))


def test_bytes_of_the_fast_tier_hold_pages_of_every_size():
    model, ids = build(), tokens(2, LENGTH)
    cache = lcpatch.TieredCache(model, gpu_bytes=80_000, **OWN)
    feed(model, ids, cache, CUT)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.pages.keys, layer.pages.values))
    assert [layer.pages.fast.slots for layer in cache.layers] == [12, 5]
    assert 70_000 < held <= 80_000


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ([4], "one for each of the model's 2 layers"),
        ("auto", "page='auto' must be tokens a page"),
        ([4, "8"], "must be tokens a page"),
        ([4, 6], "page=6 must be a power of two"),
    ],
)
def test_sizes_that_cannot_be_are_refused(page, message):
    with pytest.raises(ValueError, match=message):
        lcpatch.TieredCache(build(), 48, page=page, recent=4)


# The measurement.


def call_of(kind, length=300):
    """One query head whose mass falls on 48 keys: here and there, or in three whole passages."""
    k, v = 0.1 * randn(1, 1, length, 8, seed=1), randn(1, 1, length, 8, seed=2)
    direction = torch.nn.functional.normalize(randn(8, seed=3), dim=0)
    place = torch.arange(48) * 6 if kind == "scattered" else torch.cat([torch.arange(n, n + 16) for n in (32, 96, 192)])
    k[0, 0, place] += 6 * direction
    return Call((4 * direction).expand(1, 1, length, 8), k, v, own_spec(1, None), None, None, None, "auto")


def test_scattered_keys_want_short_pages_and_passages_do_not():
    found = {}
    for kind in ("scattered", "passages"):
        probe = _Probe([Reads(96, page, 4, 4) for page in (1, 16)], 48, 3)
        probe.attend(call_of(kind))
        found[kind] = probe.recalled
    assert found["scattered"][1] > 0.9 > 0.5 > found["scattered"][16]
    assert min(found["passages"].values()) > 0.9


def test_the_share_is_the_one_that_the_cache_itself_recalls():
    """In the first layer, whose queries do not depend on what was read before."""
    model, ids = build(), tokens(2, 200)
    measured = recall_by_page(model, ids, 0.4, pages=(4, 16), recent=4, queries=1)
    for page in (4, 16):
        cache = lcpatch.TieredCache(model, 0.4, page=page, recent=4, codec=None)
        feed(model, ids, cache, [199, 1])
        want = cache.stats(measure=True)["mass_recalled_by_layer"][0]
        assert abs(measured[0][page] - want) <= 1e3 * torch.finfo(torch.float32).eps
    assert measured[0][4] != measured[0][16]


def test_the_largest_size_that_loses_next_to_nothing_is_chosen():
    model, ids = build(), tokens(1, 200)
    measured = recall_by_page(model, ids, 0.4, **SIZES)
    assert page_sizes(model, ids, 0.4, loss=0.999, **SIZES) == [16, 16]
    exact = [max(by, key=lambda size, by=by: (by[size], size)) for by in measured]
    assert page_sizes(model, ids, 0.4, loss=0, **SIZES) == exact
    cache = lcpatch.TieredCache(model, 0.4, page=exact, recent=4)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=5).shape == (1, 205)


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
def test_layers_with_windows_get_the_default():
    model = build("gemma3_text")
    assert page_sizes(model, tokens(1, 200), 0.4, pages=(4,), recent=4) == [4, 32, 4]


def test_measuring_leaves_the_model_as_it_was():
    model, ids = build().train(), tokens(1, 200)
    model.lm_head.eval()
    page_sizes(model, ids, 0.4, **SIZES)
    assert model.training
    assert not model.lm_head.training
    model.eval()
    lcpatch.remove(model)
    assert torch.equal(model(ids).logits, build()(ids).logits)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (200, {"budget": 4096, "pages": (4,)}, "holds all of this text"),
        (200, {}, "less than the 4 pages that are always read when a page has 64"),
        (10, {}, "more than queries=16"),
        (200, {"loss": 2}, "loss=2"),
    ],
)
def test_texts_that_tell_nothing_are_refused(length, options, message):
    with pytest.raises(ValueError, match=message):
        page_sizes(build(), tokens(1, length), **{"pages": (64,), **options})
