"""What lies where changes nothing: tiers, disks and prefetching give what one tier gives. And failures are said."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from cache_cases import LENGTH, feed, left_padding, randn, step
from models import build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
from lcpatch.caches.codec import codec_named
from lcpatch.caches.reads import Reads
from lcpatch.caches.records import Record
from lcpatch.caches.tiered import TieredLayer
from lcpatch.caches.tiers import TieredPages

PAGE, READS = 4, 8
SMALL = {"budget": READS * PAGE, "page": PAGE, "recent": 4, "codec": None}
CUT = [50, *[1] * (LENGTH - 50)]
EPS = torch.finfo(torch.float64).eps


def layer_for(top=None, folder=None, codec=None):
    return TieredLayer(
        Reads(READS * PAGE, PAGE, 4, 4), top, lambda: TieredPages(PAGE, codec_named(codec), folder, 2000)
    )


def bounds_of(q, k):
    """Upper bounds [K, G, pages] of the full pages of one row, from their keys."""
    pages = k[:, : k.shape[1] // PAGE * PAGE].unflatten(1, (-1, PAGE))
    q = q.unflatten(0, (k.shape[0], -1))[:, :, None]
    return torch.maximum(q * pages.amin(2)[:, None], q * pages.amax(2)[:, None]).sum(-1)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("top", [1, 4, None])
def test_a_token_attends_to_what_it_chose_and_proven_choices_hold_the_best_keys(top, disk, tmp_path):
    layer = layer_for(top, tmp_path if disk else None)
    length = 130
    k = randn(2, 3, length, 8, seed=2).cumsum(2) / 3  # pages that differ, so that some proofs succeed
    q, v = randn(2, 6, length, 8, seed=1), randn(2, 3, length, 8, seed=3)
    step(layer, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    proofs, choose, seen = 0, layer.choose, {}

    def watched(query, marks, scale):
        """A page that this token has filled is known to the tree only afterwards."""
        seen["wanted"] = layer.index.top or (marks.chosen * PAGE // 4)
        possible, upper = layer.index.tree.search(query, [seen["wanted"]] * 2)
        seen["possible"] = possible.masked_fill(upper.isinf(), -1)
        seen["pages"] = choose(query, marks, scale)
        return seen["pages"]

    layer.choose = watched
    for n in range(90, length):
        out, _ = step(layer, *(x[:, :, n : n + 1] for x in (q, k, v)))
        pages, wanted, newest = seen["pages"], seen["wanted"], n // PAGE
        for row in range(2):
            for head in range(3):
                chosen = sorted(set(pages[row, head].tolist()) - {-1})
                assert len(chosen) <= READS
                assert {0, newest} <= set(chosen)
                index = torch.cat([torch.arange(p * PAGE, min((p + 1) * PAGE, n + 1)) for p in chosen])
                mine, keys = q[row, 2 * head : 2 * head + 2, n], k[row, head, : n + 1]
                want = (mine @ keys[index].T * 8**-0.5).softmax(-1) @ v[row, head, index]
                assert distance(out[row, 2 * head : 2 * head + 2, 0], want) <= 100 * EPS * v.abs().max()
                if layer.index.fits[row, head]:
                    proofs += 1
                    best = (mine @ keys[: newest * PAGE].T).topk(wanted, -1).indices // PAGE
                    assert set(best.flatten().tolist()) <= set(chosen)
                else:  # then, of the pages that are not ruled out, the best upper bounds are read
                    possible = seen["possible"][row, head].tolist()
                    upper = bounds_of(q[row, :, n], k[row, :, : n + 1])[head].amax(0)[:newest]
                    free = [p for p in chosen if p not in (0, newest) and p < (n - 3) // PAGE]
                    others = [p for p in possible if 0 < p < (n - 3) // PAGE and p not in free]
                    assert set(free) <= set(possible)
                    assert upper[free].min() >= upper[others].max() - 1e-9
    assert proofs > 0 or top is None


def test_a_wrong_page_would_be_seen(monkeypatch):
    real = TieredPages.fetch

    def swapped(self, pages, newest):
        keys, values, slots = real(self, pages, newest)
        return keys, values.roll(1, 1), slots

    monkeypatch.setattr(TieredPages, "fetch", swapped)
    layer = layer_for()
    q, k, v = randn(1, 6, 91, 8, seed=1), randn(1, 3, 91, 8, seed=2), randn(1, 3, 91, 8, seed=3)
    other = layer_for()
    step(layer, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    step(other, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    wrong, _ = step(layer, *(x[:, :, 90:] for x in (q, k, v)))
    monkeypatch.undo()
    assert distance(step(other, *(x[:, :, 90:] for x in (q, k, v)))[0], wrong) > 1e-3


@pytest.mark.parametrize(
    "options", [{"disk": True, "host_bytes": 0}, {"disk": True, "host_bytes": 60000}, {"ahead": True}]
)
def test_tiers_and_prefetching_change_no_bit(options, tmp_path):
    model, ids, mask = build(), tokens(3, LENGTH), left_padding([0, 37, 11])
    if options.get("disk"):
        options = {**options, "disk": str(tmp_path)}
    want, got = (feed(model, ids, lcpatch.TieredCache(model, **SMALL, **o), CUT, mask) for o in ({}, options))
    assert torch.equal(want, got)
    assert list(tmp_path.iterdir()) == []


def test_beams_and_several_caches_share_a_folder(tmp_path):
    model, ids = build(), tokens(2, 60)
    options = {"max_new_tokens": 25, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, past_key_values=lcpatch.TieredCache(model, **SMALL), **options)
    caches = [lcpatch.TieredCache(model, **SMALL, disk=str(tmp_path), host_bytes=0) for _ in range(2)]
    for cache in caches:
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)


@pytest.mark.parametrize("codec", [None, "int8", "int4", "fp8", "bf16"])
def test_with_room_for_everything_no_codec_is_felt(codec):
    """A page loses precision when it comes back; one that never left has all of it."""
    model, ids = build(), tokens(2, LENGTH)
    cache = lcpatch.TieredCache(model, 4096, codec=codec)
    want = feed(model, ids, DynamicCache(config=model.config), CUT)
    assert distance(feed(model, ids, cache, CUT), want) <= model_budget(model, ids)
    assert cache.stats()["hit_rate"] == 1


@pytest.mark.parametrize("codec", [None, "int8", "int4", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_come_back_as_the_codec_promises(codec, dtype):
    pages, coder = randn(5, 2, PAGE, 8, seed=1).to(dtype), codec_named(codec)
    record = Record(coder, PAGE, torch.empty(1, 2, 0, 8, dtype=dtype))
    packed = record.pack(pages)
    assert packed.shape == (5, record.nbytes)
    assert torch.equal(record.unpack(packed), coder.decode(coder.encode(pages), pages))


def test_smaller_codecs_take_less_room_and_lose_more():
    model, ids = build(), tokens(2, LENGTH)
    outs, held = {}, {}
    for codec in (None, "int8", "int4"):
        cache = lcpatch.TieredCache(model, **{**SMALL, "codec": codec})
        outs[codec], held[codec] = feed(model, ids, cache, CUT), cache.memory()["host"]
    assert held[None] > held["int8"] > held["int4"]
    assert 0 < (outs["int8"] - outs[None]).abs().mean() < (outs["int4"] - outs[None]).abs().mean()


def test_what_left_the_fast_tier_is_found_again(tmp_path):
    """A key that nothing asked for in 200 tokens comes back from disk."""
    k, v, q = randn(1, 3, 300, 8, seed=1), randn(1, 3, 300, 8, seed=2), randn(1, 6, 300, 8, seed=3)
    needle = 4 * torch.nn.functional.normalize(randn(1, 3, 1, 8, seed=4), dim=-1)
    k[:, :, 37:38] = needle
    layer = layer_for(folder=tmp_path)
    step(layer, q[:, :, :100], k[:, :, :100], v[:, :, :100])
    for n in range(100, 299):
        step(layer, *(x[:, :, n : n + 1] for x in (q, k, v)))
    q[:, :, 299:] = needle.repeat_interleave(2, 1) * 20
    out, _ = step(layer, *(x[:, :, 299:] for x in (q, k, v)))
    assert distance(out, v[:, :, 37:38].repeat_interleave(2, 1)) < 1e-3


def test_stats_and_bytes_per_tier(tmp_path):
    model = build()
    cache = lcpatch.TieredCache(model, **SMALL, disk=str(tmp_path), host_bytes=20000)
    model.generate(tokens(2, 100), max_new_tokens=30, do_sample=False, past_key_values=cache)
    stats, held = cache.stats(), cache.memory()
    assert (stats["seen"], stats["kept"], stats["attended"]) == (129, 129, READS * PAGE)
    assert 0 < stats["hit_rate"] < 1
    assert 0 <= stats["proven"] <= 1
    assert stats["fetched_ahead"] > 0
    assert stats["from_disk"] > 0
    assert set(held) == {"device", "host", "disk"}
    assert 0 < held["host"] <= 20000
    assert held["disk"] >= 2 * 2 * 3 * (129 // PAGE) * 4096  # a record takes a block of the disk


def test_host_memory_before_a_disk_is_no_more_than_what_is_held(tmp_path):
    """A gibibyte is allowed."""
    model, ids = build(), tokens(2, 130)
    here, disk = (lcpatch.TieredCache(model, **SMALL, disk=folder) for folder in (None, str(tmp_path)))
    for cache in (here, disk):
        feed(model, ids, cache, [100, *[1] * 30])
    records = 2 * 2 * 3 * (130 // PAGE)
    record = disk.layers[0].pages.home.record.nbytes
    assert records * record <= disk.memory()["host"] <= 1.25 * records * record
    assert disk.stats()["from_disk"] == 0


def test_what_several_tokens_bring_in_is_counted():
    """In each turn, of every group, the full pages that the fast tier does not hold."""
    model = build()
    cache = lcpatch.TieredCache(model, **SMALL)
    feed(model, tokens(2, 100), cache, [60, 40])
    groups = 2 * model.config.num_key_value_heads * model.config.num_hidden_layers
    assert cache.stats()["from_host"] == groups * (60 // PAGE - READS + 100 // PAGE - READS)


def test_a_query_that_does_not_change_finds_its_pages():
    """The second of two equal queries asks for what the first brought."""
    layer = layer_for()
    q, k, v = (randn(1, h, 103, 8, seed=h + n) for n, h in enumerate((6, 3, 3)))
    step(layer, q[:, :, :101], k[:, :, :101], v[:, :, :101])
    q[:, :, 102] = q[:, :, 101]
    step(layer, *(x[:, :, 101:102] for x in (q, k, v)))
    before = layer.pages.traffic()
    step(layer, *(x[:, :, 102:103] for x in (q, k, v)))
    after = layer.pages.traffic()
    assert after["wanted"] > before["wanted"]
    assert after["missed"] == before["missed"]


def test_a_full_disk_is_said_and_reset_goes_on(tmp_path, monkeypatch):
    model, ids = build(), tokens(1, 120)
    cache, other = (lcpatch.TieredCache(model, **SMALL, disk=str(tmp_path), host_bytes=0) for _ in range(2))
    feed(model, ids[:, :60], cache, [60])
    want = feed(model, ids, other, [100, *[1] * 20])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(lcpatch.LcpatchError, match="it is full"):
        feed(model, ids[:, 60:], cache, [60])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="failed half-way"):
        feed(model, ids[:, 60:], cache, [60])
    cache.reset()
    assert torch.equal(feed(model, ids, cache, [100, *[1] * 20]), want)
    model(tokens(1, 1), past_key_values=other)


def test_bytes_of_the_fast_tier_instead_of_tokens():
    model = build()
    config = model.config
    page = 2 * config.num_hidden_layers * config.num_key_value_heads * PAGE * config.head_dim * 4 * 2
    cache = lcpatch.TieredCache(model, gpu_bytes=9 * page, page=PAGE, recent=4, codec=None)
    same = lcpatch.TieredCache(model, **SMALL)
    ids = tokens(2, LENGTH)
    assert torch.equal(feed(model, ids, cache, CUT), feed(model, ids, same, CUT))
    held = sum(x.nbytes for layer in cache.layers for x in (layer.pages.keys, layer.pages.values))
    assert held <= 9 * page
    small = lcpatch.TieredCache(model, gpu_bytes=3 * page, page=PAGE, recent=4)
    with pytest.raises(ValueError, match="2 pages of 4 tokens for 2 rows; 4 are wanted at least"):
        feed(model, ids, small, [LENGTH])


def test_what_is_attended_to_and_what_the_fast_tier_holds_are_two_numbers():
    """A row that the fast tier holds is read in full, a longer one as far as `attend` allows; what a wider fast tier
    changes is the hit rate alone."""
    model, ids = build(), tokens(1, 240)
    wide = lcpatch.TieredCache(model, **{**SMALL, "budget": 160}, attend=READS * PAGE)
    dense = feed(model, ids[:, :160], DynamicCache(config=model.config), [100, *[1] * 60])
    assert distance(feed(model, ids[:, :160], wide, [100, *[1] * 60]), dense) <= model_budget(model, ids)
    assert wide.stats()["attended"] == 160
    model(ids[:, 160:161], past_key_values=wide)
    assert wide.stats()["attended"] == READS * PAGE
    cut = [180, *[1] * 60]
    wide.reset()
    narrow = lcpatch.TieredCache(model, **SMALL)
    assert torch.equal(feed(model, ids, wide, cut), feed(model, ids, narrow, cut))
    wide, narrow = wide.stats(), narrow.stats()
    assert wide["attended"] == narrow["attended"] == READS * PAGE
    assert wide["hit_rate"] > narrow["hit_rate"]
    assert 0 < wide["fetched_bytes"] < narrow["fetched_bytes"]


def test_with_a_codec_a_row_does_not_depend_on_the_rows_beside_it():
    """Each row has slots of its own budget: a page leaves, and loses precision, when it would if the row were alone."""
    model, pads, cut = build(), [0, 61, 33], [100, *[1] * 40]
    ids, mask = tokens(3, sum(cut)), left_padding(pads, sum(cut))
    options = {"budget": 0.3, "page": PAGE, "recent": 4, "codec": "int4"}
    got = feed(model, ids, lcpatch.TieredCache(model, **options), cut, mask)
    for row, skip in enumerate(pads):
        alone = feed(model, ids[row : row + 1, skip:], lcpatch.TieredCache(model, **options), [cut[0] - skip, *cut[1:]])
        assert distance(got[row : row + 1, skip:], alone) <= model_budget(model, ids)


def test_a_thread_reads_ahead_under_inference_mode(tmp_path):
    model, ids = build(), tokens(1, LENGTH)
    want = feed(model, ids, lcpatch.TieredCache(model, **SMALL), CUT)
    cache = lcpatch.TieredCache(model, **SMALL, disk=str(tmp_path), host_bytes=20000)
    with torch.inference_mode():
        got = feed(model, ids, cache, CUT)
    assert torch.equal(got, want)
    assert cache.stats()["fetched_ahead"] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 100, "gpu_bytes": 1 << 20}, ValueError, "not both"),
        ({"top": 0}, ValueError, "top=0"),
        ({"attend": 0}, ValueError, "attend=0"),
        ({"attend": 128}, ValueError, "attend=128 must hold .* at least 160"),
        ({"attend": 8192, "budget": 4096}, ValueError, "attend=8192 must be at most budget=4096"),
        ({"attend": 8192, "budget": np.int64(4096)}, ValueError, "attend=8192 must be at most budget=4096"),
        ({"budget": 128}, ValueError, "at least 160 with page=32"),
        ({"codec": "int2"}, ValueError, "codec='int2' is not one of"),
        ({"host_bytes": -1}, ValueError, "host_bytes=-1"),
        ({"host_bytes": 0.5}, ValueError, "host_bytes=0.5 must be"),
        ({"gpu_bytes": 0}, ValueError, "gpu_bytes=0"),
        ({"disk": 5}, ValueError, "disk=5 must be a folder"),
    ],
)
def test_what_cannot_work_says_why(options, error, message):
    with pytest.raises(error, match=message):
        lcpatch.TieredCache(build(), **options)


def test_a_folder_that_cannot_be_used_is_said_at_once_and_none_is_made(tmp_path):
    model = build()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "none", str(tmp_path / "none" / "deeper")):
        with pytest.raises(lcpatch.LcpatchError, match=r"no file can be made there: .* give a folder that is there"):
            lcpatch.TieredCache(model, **SMALL, disk=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("seed", "options"), [(0, {}), (1, {}), (2, {"codec": "int4", "ahead": True})])
def test_random_schedules_on_disk_are_those_in_memory(seed, options, tmp_path):
    """Little room, steps taken back, rows chosen and repeated: where the pages lie changes no bit. With a codec, which
    pages have left does, and so fetching ahead."""
    rng, model, options = random.Random(seed), build(), {**SMALL, **options}
    caches = [
        lcpatch.TieredCache(model, **options),
        lcpatch.TieredCache(model, **options, disk=str(tmp_path), host_bytes=rng.choice([0, 20000])),
    ]
    texts, pads, seen = [tokens(1, 300, seed=n)[0] for n in range(2)], [0, rng.choice([0, 21])], 0
    while seen < 130:
        size = rng.choice([1, 1, 1, 1, 3, 40])
        ids, mask = torch.stack([text[seen : seen + size] for text in texts]), left_padding(pads, seen + size)
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        with torch.no_grad():
            one, other = (
                model(ids, attention_mask=mask, position_ids=position, past_key_values=c).logits for c in caches
            )
        assert torch.equal(one, other)
        seen += size
        change = rng.choice(["crop", "rows", None, None])
        if change == "crop" and seen > 60:
            num = rng.randint(1, 11)
            seen -= num
            for cache in caches:
                cache.crop(-num)
        elif change == "rows":
            index = torch.tensor([rng.randrange(len(texts)) for _ in range(rng.randint(1, 3))])
            texts, pads = [texts[n].roll(seen) for n in index], [pads[n] for n in index]
            for cache in caches:
                cache.reorder_cache(index)
