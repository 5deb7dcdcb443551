"""Merging instead of dropping: what a centroid stands for, that attention to it is exact where it can be, budgets."""

import math
from contextlib import nullcontext

import pytest
import torch
from cache_cases import LENGTH, feed, left_padding, make_model, randn, step
from models import build, tokens
from noise import distance, model_budget

import lcpatch
from lcpatch.caches.budget import Budget
from lcpatch.caches.cluster import ClusterLayer, Clusters, Merging, reduce, shrink
from lcpatch.hf.state import own_spec
from lcpatch.hf.watch import Call, attend

SINKS, RECENT = 4, 6


def pairs(groups, times):
    """Keys [2, 3, T, 8] in which, between sinks and recent tokens, `times` neighbours are equal; any values."""
    middle = randn(2, 3, groups, 8).repeat_interleave(times, 2)
    k = torch.cat([randn(2, 3, SINKS, 8, seed=1), middle, randn(2, 3, RECENT, 8, seed=2)], 2)
    return k, randn(*k.shape, seed=3)


def layer_for(budget, chunk=128, **options):
    merging = Merging(chunk, options.pop("passes", 1), options.pop("weighted", True), "auto")
    return ClusterLayer(Budget(budget, SINKS, RECENT), merging, options.pop("log_size", True), None)


@pytest.mark.parametrize("later", [1, 3])
@pytest.mark.parametrize("times", [2, 4])
def test_attention_over_merged_equal_keys_is_exact(times, later):
    """However many passes: a later token or chunk gets what full attention gives it."""
    k, v = pairs(20, times)
    layer = layer_for(SINKS + 20 + RECENT, chunk=2)
    q = randn(2, 6, k.shape[2] + later, 8, seed=4)
    step(layer, q[:, :, :-later], k, v)
    assert layer.counts == [SINKS + 20 + RECENT] * 2
    new = randn(2, 3, later, 8, seed=5), randn(2, 3, later, 8, seed=6)
    out, lse = step(layer, q[:, :, -later:], *new)
    full = Call(
        q[:, :, -later:], torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2), own_spec(6, None), *[None] * 3, "auto"
    )
    want_out, want_lse = attend(full)
    # Sums of so many terms, and the log of a size, which is kept in fp32 and moves a probability by its rounding.
    rounding = 16 * torch.finfo(torch.float64).eps * k.shape[2] + torch.finfo(torch.float32).eps * math.log(times)
    assert distance(out, want_out) <= rounding * v.abs().max()
    assert distance(lse, want_lse) <= rounding * want_lse.abs().max()
    wrong = layer_for(SINKS + 20 + RECENT, chunk=2, log_size=False)
    step(wrong, q[:, :, :-later], k, v)
    assert distance(step(wrong, q[:, :, -later:], *new)[0], want_out) > 1e-3, "without log n it must not be"


@pytest.mark.parametrize("cut", [[LENGTH], [30, 1, 1, 28, 30], [50, *[1] * 40]])
def test_every_token_stands_in_one_slot_and_values_are_conserved(cut):
    model = build().double()
    ids, pads = tokens(2, LENGTH), [0, 11]
    mask = left_padding(pads)
    cache, full = lcpatch.ClusterCache(model, budget=24), lcpatch.ClusterCache(model, budget=LENGTH)
    feed(model, ids, cache, cut, mask)
    feed(model, ids, full, [LENGTH], mask)
    layer, whole = cache.layers[0], full.layers[0]  # of the first layer, whose values do not depend on the cache
    for row, count in enumerate(layer.counts):
        size = (layer.slots["joined"][row, :, -count:] + 1).double()
        assert (size.sum(-1) == LENGTH - pads[row]).all()
        assert torch.equal(layer.slots["log_size"][row, :, -count:], size.float().log())
        total = (layer.slots["values"][row, :, -count:] * size[..., None]).sum(1)
        want = whole.slots["values"][row, :, pads[row] :].sum(1)
        assert distance(total, want) <= 1e3 * torch.finfo(torch.float64).eps * want.abs().max()


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({"budget": 24, "recent": 8, "evict_every": 100}, [50, *[1] * 40]),
        ({"budget": 6, "recent": 1}, [1] * LENGTH),
        ({"budget": 0.1}, [1] * LENGTH),
        ({"budget": 0.1, "recent": 3}, [LENGTH]),
    ],
)
def test_sinks_and_recent_tokens_never_merge(options, cut):
    """However rarely it compacts and however little there is: one slot is left to merge to."""
    model = build()
    cache = lcpatch.ClusterCache(model, **options)
    feed(model, tokens(3, LENGTH), cache, cut, left_padding([0, LENGTH - 1, 11]))
    for layer in cache.layers:
        for row, pads in enumerate(layer.pads):
            count, real = layer.counts[row], LENGTH - pads
            sinks, recent = (min(n, real) for n in layer.budget.protected(layer.budgets[row]))
            kept, joined = (x[row, :, -count:] for x in (layer.key_positions(), layer.slots["joined"]))
            assert (kept[:, :sinks] == torch.arange(sinks)).all()
            assert (kept[:, -recent:] == torch.arange(real - recent, real)).all()
            assert not joined[:, :sinks].any()
            assert not joined[:, -recent:].any()


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.2, 0.1])
def test_shares_are_really_reached(budget):
    """A pass at most halves, so 80 % takes three: exactly the share is kept at any length, and no more is allocated."""
    model = build()
    config = model.config
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * (2 * config.head_dim + 3) * 4
    for length in (250, 333):
        cache = lcpatch.ClusterCache(model, budget, chunk=32)
        feed(model, tokens(2, length), cache, [length])
        kept = math.ceil(budget * length)
        assert cache.stats()["kept"] == kept
        assert cache.memory()["device"] <= (kept + 1) * slot


def test_old_text_keeps_its_share():
    """Read in many chunks under a fixed budget, the first half of a text holds about half of the slots."""
    k = randn(1, 3, 4000, 8).cumsum(2)
    layer = layer_for(SINKS + 100 + RECENT, chunk=16)
    for part in k.split(200, 2):
        step(layer, part.repeat_interleave(2, 1), part, part)
    size = (layer.slots["joined"] + 1)[..., SINKS:-RECENT]
    before = (size.cumsum(-1) <= 2000).sum(-1)
    assert ((before >= 35) & (before <= 65)).all(), before
    assert (size.sum(-1) == 4000 - SINKS - RECENT).all()


def test_rows_of_clusters_become_as_many_as_asked_for():
    for slots in (7, 64, 129):
        for to in {1, 2, slots // 3 + 1, slots // 2 + 1, slots - 1}:
            for chunk, passes in ((2, 1), (16, 1), (128, 3)):
                k = randn(1, 2, slots, 4)
                made = Clusters(k, k, torch.ones(1, 2, slots), torch.arange(slots).expand(1, 2, -1).int())
                got = reduce(made, to, Merging(chunk, passes))
                assert got.size.shape[2] == to
                assert (got.size.sum(-1) == slots).all()
                assert (got.position.diff() > 0).all()
                for old in (0, 1, slots // 2, slots):
                    assert shrink(made, old, to, slots, Merging(chunk, passes)).size.sum() == 2 * slots


@pytest.mark.parametrize("change", [{"weighted": False}, {"log_size": False}, {"chunk": 8}, {"passes": 4}])
def test_each_switch_changes_what_is_computed(change):
    model, ids = build(), tokens(2, LENGTH)
    first, second = (feed(model, ids, lcpatch.ClusterCache(model, 24, **o), [60, 20, *[1] * 10]) for o in ({}, change))
    assert torch.equal(first[:, :60], second[:, :60])
    assert distance(first[:, 60:], second[:, 60:]) > 100 * model_budget(model, ids)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "fp8"])
def test_codecs(codec):
    """Centroids are merged decoded and stored encoded; what differs is what the codec loses, and int8 loses least."""
    model, ids = build(), tokens(2, LENGTH)
    cut = [60, 20, *[1] * 10]
    plain, coded = (lcpatch.ClusterCache(model, 24, codec=c) for c in (None, codec))
    want, got = (feed(model, ids, c, cut) for c in (plain, coded))
    assert coded.stats()["kept"] == plain.stats()["kept"]
    assert coded.memory()["device"] < plain.memory()["device"]
    layer = coded.layers[0]
    assert ((layer.slots["joined"] + 1).sum(-1) == LENGTH).all()
    assert distance(got[:, :60], want[:, :60]) == 0
    assert distance(got, want) > 0


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_softcaps_and_windows(family):
    """A softcap comes before the bias; a row is what it is alone."""
    model = build(family)
    ids, mask = tokens(2, LENGTH), left_padding([0, 11])
    with pytest.warns(UserWarning, match="keep transformers' own cache") if family == "gemma2" else nullcontext():
        cache, alone = (lcpatch.ClusterCache(model, 24) for _ in range(2))
    cut = [50, 20, *[1] * 20]
    got = feed(model, ids, cache, cut, mask)
    want = feed(model, ids[1:, 11:], alone, [39, *cut[1:]])
    assert distance(got[1:, 11:], want) <= model_budget(build(family), ids)


def test_with_a_pattern():
    """Centroids count by their position: a sparse layer sees those that its pattern shows."""
    model = make_model("s2")
    cache = lcpatch.ClusterCache(model, 24)
    out = model.generate(tokens(2, 60), max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert out.shape == (2, 70)
    assert cache.stats()["kept"] <= 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 7}, "chunk=7 must be an even"),
        ({"passes": 0}, "passes=0"),
        ({"impl": "cuda"}, "impl='cuda' is not one of"),
        ({"num_sinks": 0}, "at least one sink"),
        ({"budget": 10, "recent": 6}, "and a slot beside them: at least 11"),
        ({"budget": 0}, "budget=0 must be"),
        ({"codec": "int3"}, "codec='int3' is not one of"),
    ],
)
def test_what_cannot_work_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        lcpatch.ClusterCache(build(), **options)
