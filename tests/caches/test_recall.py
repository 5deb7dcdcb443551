"""The attention mass recalled is what a dense softmax in float64 says, and nobody pays who does not ask."""

import pytest
import torch
from cache_cases import ALL, LENGTH, feed, left_padding, make, make_model, randn, step
from models import build, tokens
from noise import distance

import lcpatch
from lcpatch.caches import paged
from lcpatch.caches.codec import codec_named
from lcpatch.caches.paged import PagedLayer
from lcpatch.caches.pages import Pages
from lcpatch.caches.reads import Reads
from lcpatch.caches.scorer_index import ScorerIndex
from lcpatch.caches.scorers import Mean
from lcpatch.caches.tiered import TieredLayer
from lcpatch.caches.tiers import TieredPages

PAGE, READS, SELECTING = 4, 8, ("retrieval", "tiered")
EPS = torch.finfo(torch.float64).eps
CUT = [50, *[1] * (LENGTH - 50)]


def layer_for(name, codec=None):
    reads = Reads(READS * PAGE, PAGE, 4, 4)
    if name == "tiered":
        return TieredLayer(reads, None, lambda: TieredPages(PAGE, codec_named(codec)))
    return PagedLayer(reads, lambda reads, rows: ScorerIndex(Mean(), PAGE, "max", rows), lambda: Pages(PAGE))


def shares(q, k, pages):
    """[B, H]: what the softmax over all keys gives those on `pages` [B, K, M], densely."""
    group = q.shape[1] // k.shape[1]
    p = (q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
    page = torch.arange(k.shape[2]) // PAGE
    read = (pages[..., None] == page).any(2).repeat_interleave(group, 1)
    return (p * read).sum(-1)


@pytest.mark.parametrize(("name", "codec"), [("retrieval", None), ("tiered", None), ("tiered", "int8")])
def test_it_is_what_a_dense_softmax_gives_the_pages_that_were_read(name, codec):
    layer = layer_for(name, codec)
    q, k, v = randn(2, 6, 110, 8, seed=1), randn(2, 3, 110, 8, seed=2), randn(2, 3, 110, 8, seed=3)
    step(layer, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    assert layer.recalled() is None
    for n in range(90, 110):
        now = q[:, :, n : n + 1]
        step(layer, now, *(x[:, :, n : n + 1] for x in (k, v)))
        keys = layer.pages.whole()[0]  # with a codec, what pages are once they have left
        assert torch.equal(keys, k[:, :, : n + 1]) == (codec is None)
        want = shares(now, keys, layer.choose(now, layer._marks))
        assert distance(layer.recalled(), want) <= 100 * EPS
        assert want.max() < 0.98
    other = layer.choose(now, layer._marks).roll(1, 1)  # negative control: another head's pages
    assert distance(layer.recalled(), shares(now, keys, other)) > 0.01
    rows = torch.tensor([1, 1, 0])
    before = layer.recalled()
    layer.reorder_cache(rows)
    assert torch.equal(layer.recalled(), before[rows])
    layer.crop(-1)
    assert layer.recalled() is None


@pytest.mark.parametrize("name", SELECTING)
def test_stats_give_the_mean_over_rows_that_have_begun(name):
    model, ids, pads = build(), tokens(3, LENGTH), [0, 37, LENGTH]
    cache = make(name, model, small=True)
    feed(model, ids, cache, CUT, left_padding(pads))
    stats, alone = cache.stats(measure=True), []
    for row, pad in enumerate(pads[:2]):
        single = make(name, model, small=True)
        feed(model, ids[row : row + 1, pad:], single, [CUT[0] - pad, *CUT[1:]])
        alone.append(single.stats(measure=True)["mass_recalled"])
    assert 0.1 < stats["mass_recalled"] < 0.99
    fp32 = torch.finfo(torch.float32).eps
    assert abs(stats["mass_recalled"] - sum(alone) / 2) <= 1e3 * fp32
    assert stats["mass_recalled"] == pytest.approx(sum(stats["mass_recalled_by_layer"].values()) / 2)


@pytest.mark.parametrize("name", SELECTING)
def test_with_room_for_everything_nothing_is_missed(name):
    model = build()
    cache = make(name, model)
    feed(model, tokens(2, LENGTH), cache, CUT)
    assert cache.stats(measure=True)["mass_recalled"] >= 1 - 1e3 * torch.finfo(torch.float32).eps
    feed(model, tokens(2, 9), cache, [9])
    assert cache.stats(measure=True)["mass_recalled"] is None


def test_a_pattern_sees_all_that_it_may():
    model = make_model("s2")
    cache = make("retrieval", model, small=True)
    feed(model, tokens(2, LENGTH), cache, CUT)
    assert cache.stats(measure=True)["mass_recalled"] >= 1 - 1e3 * torch.finfo(torch.float32).eps


def test_measuring_changes_nothing_and_not_measuring_costs_nothing(tmp_path, monkeypatch):
    """Neither the logits to come nor the counts; and no attention runs that nobody asked for."""
    model, ids = build(), tokens(2, LENGTH)
    calls, real = [], paged.decode
    monkeypatch.setattr(paged, "decode", lambda *a, **kw: calls.append(1) or real(*a, **kw))
    options = {"budget": 24, "page": PAGE, "recent": 4, "disk": str(tmp_path), "host_bytes": 4000}
    outs, counted = [], []
    for measure in (False, True):
        cache = lcpatch.TieredCache(model, **options)
        calls.clear()
        logits = [feed(model, ids[:, :50], cache, [50])]
        for n in range(50, LENGTH):
            logits.append(feed(model, ids[:, n : n + 1], cache, [1]))
            stats = cache.stats(measure=measure)
        outs.append(torch.cat(logits, 1))
        counted.append({k: stats[k] for k in ("attended", "hit_rate", "proven", "kept_share")})
        assert len(calls) == (LENGTH - 50) * len(cache.layers) * (1 + measure)
        assert ("mass_recalled" in stats) == measure
    assert torch.equal(*outs)
    assert counted[0] == counted[1]


def test_what_is_read_to_measure_is_no_traffic():
    model = build()
    cache = make("retrieval", model, small=True, offload=True, codec="int8")
    feed(model, tokens(2, LENGTH), cache, CUT)
    before = cache.stats()
    assert 0 < cache.stats(measure=True)["mass_recalled"] < 1
    assert cache.stats() == before


@pytest.mark.parametrize("name", [n for n in ALL if n not in SELECTING])
def test_what_is_gone_is_not_measured(name):
    model = make_model(name)
    cache = make(name, model, small=True)
    assert cache.stats()["kept_share"] is None
    feed(model, tokens(3, LENGTH), cache, [LENGTH], left_padding([0, 37, 11]))
    with pytest.raises(ValueError, match="nothing can be measured against it"):
        cache.stats(measure=True)
    if name != "s2":
        assert cache.stats()["kept_share"] == pytest.approx(3 * 24 / (3 * LENGTH - 48))
