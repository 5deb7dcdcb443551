"""Nothing is lost, and a token reads the pages that its scorer ranks highest, per KV head."""

import itertools

import numpy as np
import pytest
import torch
from cache_cases import LENGTH, feed, left_padding, make, make_model, randn, step
from models import build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
import lcpatch_kernels
from lcpatch.caches.codec import codec_named
from lcpatch.caches.paged import PagedLayer
from lcpatch.caches.pages import Pages
from lcpatch.caches.reads import Reads
from lcpatch.caches.scorer_index import ScorerIndex
from lcpatch.caches.scorers import Bookmark, Bookmarks, Mean, Quest, make_scorers, scorers
from lcpatch.caches.tiers import TieredPages

PAGE, SINKS, RECENT, READS = 4, 4, 4, 6
EPS = torch.finfo(torch.float64).eps


def layer_for(scorer="quest", group="max", offload=False, codec=None):
    (made,) = make_scorers(scorer, 1)
    return PagedLayer(
        Reads(READS * PAGE, PAGE, SINKS, RECENT),
        lambda reads, rows: ScorerIndex(made, PAGE, group, rows),
        lambda: TieredPages(PAGE, codec_named(codec)) if offload else Pages(PAGE),
    )


def page_scores(name, q, k):
    """[G, pages] of the full pages of one head by the definition, token by token."""
    pages = k[: len(k) // PAGE * PAGE].unflatten(0, (-1, PAGE))
    if name == "quest":
        return torch.maximum(q[:, None] * pages.amin(1), q[:, None] * pages.amax(1)).sum(-1)
    return q @ pages.mean(1).T


def expected(name, group, q, k, v):
    """Attention of q [H, D] over the pages of one row that it should read, head by head: [H, D]."""
    heads = k.shape[0]
    length, newest = k.shape[1], (k.shape[1] - 1) // PAGE
    outs = []
    for head, mine in enumerate(q.unflatten(0, (heads, -1))):
        scores = page_scores(name, mine, k[head])[:, :newest]
        if group == "softmax":
            scores = (scores * mine.shape[-1] ** -0.5).softmax(-1).sum(0)
        else:
            scores = scores.amax(0)
        always = [0, newest, *range((length - RECENT) // PAGE, newest)]
        free = [n for n in scores.argsort(descending=True).tolist() if n not in always]
        chosen = sorted({*always, *free[: READS - len(set(always))]})
        index = torch.cat([torch.arange(n * PAGE, min((n + 1) * PAGE, length)) for n in chosen])
        weights = (mine @ k[head, index].T * mine.shape[-1] ** -0.5).softmax(-1)
        outs.append(weights @ v[head, index])
    return torch.cat(outs)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("group", ["max", "softmax"])
@pytest.mark.parametrize("name", ["quest", "mean", "bookmark"])
def test_a_token_attends_to_the_pages_that_score_highest(name, group, offload):
    """Against the definition, at every offset within a page, wherever the pages lie."""
    layer = layer_for(name, group, offload)
    q, k, v = randn(2, 6, 90, 8, seed=1), randn(2, 3, 90, 8, seed=2), randn(2, 3, 90, 8, seed=3)
    step(layer, q[:, :, :60], k[:, :, :60], v[:, :, :60])
    for n in range(60, 90):
        out, _ = step(layer, *(x[:, :, n : n + 1] for x in (q, k, v)))
        for row in range(2):
            want = expected(name, group, q[row, :, n], k[row, :, : n + 1], v[row, :, : n + 1])
            assert distance(out[row, :, 0], want) <= 100 * EPS * v.abs().max()
    assert layer.read == READS * PAGE


def test_another_choice_would_be_seen():
    q, k, v = randn(6, 8, seed=1), randn(3, 90, 8, seed=2), randn(3, 90, 8, seed=3)
    outs = [expected(name, group, q, k, v) for name in ("quest", "mean") for group in ("max", "softmax")]
    assert all(distance(a, b) > 1e-3 for a, b in itertools.combinations(outs, 2))


def test_what_an_evicting_cache_has_dropped_is_found_again():
    """A key that nothing asked for in 200 tokens: a later query that does gets its value."""
    k, v, q = randn(1, 3, 300, 8, seed=1), randn(1, 3, 300, 8, seed=2), randn(1, 6, 300, 8, seed=3)
    needle = 4 * torch.nn.functional.normalize(randn(1, 3, 1, 8, seed=4), dim=-1)
    k[:, :, 37:38] = needle
    layer = layer_for()
    step(layer, q[:, :, :100], k[:, :, :100], v[:, :, :100])
    for n in range(100, 299):
        step(layer, *(x[:, :, n : n + 1] for x in (q, k, v)))
    q[:, :, 299:] = needle.repeat_interleave(2, 1) * 20
    out, _ = step(layer, *(x[:, :, 299:] for x in (q, k, v)))
    assert distance(out, v[:, :, 37:38].repeat_interleave(2, 1)) < 1e-3


def test_each_head_reads_its_own_pages():
    layer = layer_for()
    q, k, v = randn(1, 6, 91, 8, seed=1), randn(1, 3, 91, 8, seed=2), randn(1, 3, 91, 8, seed=3)
    step(layer, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    step(layer, *(x[:, :, 90:] for x in (q, k, v)))
    pages = layer.choose(q[:, :, 90:], layer._marks)
    assert pages.shape == (1, 3, READS)
    assert (pages[..., -1] == 22).all()
    assert (pages == 0).any(-1).all()
    assert len({tuple(sorted(x)) for x in pages[0].tolist()}) == 3


@pytest.mark.parametrize("scorer", ["quest", "mean", "bookmark"])
@pytest.mark.parametrize("group", ["max", "softmax"])
def test_generate(scorer, group):
    model = build()
    cache = lcpatch.RetrievalCache(model, 24, scorer=scorer, group=group, page=4, recent=4)
    model.generate(tokens(2, 60), max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert cache.stats() == {"seen": 79, "kept": 79, "kept_by_layer": {0: 79, 1: 79}, "kept_share": 1.0, "attended": 24}


def test_dense_layers_read_everything():
    model, ids = build(), tokens(2, LENGTH)
    cache = lcpatch.RetrievalCache(model, 24, page=4, recent=4, dense_layers=2)
    want = feed(model, ids, make("retrieval", model), [50, *[1] * 40])
    assert distance(feed(model, ids, cache, [50, *[1] * 40]), want) <= model_budget(model, ids)
    small = feed(model, ids, make("retrieval", model, small=True), [50, *[1] * 40])
    assert distance(small, want) > 100 * model_budget(model, ids)


def test_pages_in_host_memory_have_a_hit_rate():
    model, ids = build(), tokens(1, 60)
    here, away = (lcpatch.RetrievalCache(model, 24, page=4, recent=4, offload=offload) for offload in (False, True))
    for cache in (here, away):
        feed(model, ids, cache, [50, *[1] * 10])
    assert "hit_rate" not in here.stats()
    assert 0 < away.stats()["hit_rate"] < 1
    assert away.stats()["from_host"] > 0


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "bf16"])
@pytest.mark.parametrize("scorer", ["quest", "mean"])
def test_a_codec_changes_what_comes_back_and_not_what_is_known_of_it(scorer, codec):
    """Of the same keys and values: the same summaries and pages; attention loses what the codec loses, and no more."""
    bound = {"int8": 1 / 254, "int4": 1 / 15, "fp8": 2**-4, "bf16": 2**-8}[codec]
    layers = [layer_for(scorer, offload=True, codec=c) for c in (None, codec)]
    q, k, v = randn(2, 6, 130, 8, seed=1), randn(2, 3, 130, 8, seed=2), randn(2, 3, 130, 8, seed=3)
    k, lost = k / 100, 0  # attention is near the mean of the values: what keys lose is not felt
    for cut in (slice(0, 60), *(slice(n, n + 1) for n in range(60, 130))):
        (want, _), (got, _) = (step(layer, *(x[:, :, cut] for x in (q, k, v))) for layer in layers)
        lost = max(lost, distance(got, want))
    assert 0 < lost <= 1.1 * bound * v.abs().max()
    for mine, theirs in zip(*(layer.index.summary for layer in layers), strict=True):
        assert torch.equal(mine, theirs)
    assert layers[0].pages.traffic()["missed"] == layers[1].pages.traffic()["missed"] > 0
    assert layers[1].tiers()["host"] < layers[0].tiers()["host"]


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "bf16"])
def test_what_the_budget_holds_never_loses_anything(codec):
    model, ids = build(), tokens(2, LENGTH)
    cache = make("retrieval", model, offload=True, codec=codec)
    want = feed(model, ids, DynamicCache(config=model.config), [50, *[1] * 40])
    assert distance(feed(model, ids, cache, [50, *[1] * 40]), want) <= model_budget(model, ids)


def test_with_a_codec_a_row_does_not_depend_on_the_rows_beside_it():
    model, pads, cut = build(), [0, 61, 33], [100, *[1] * 40]
    ids, mask = tokens(3, sum(cut)), left_padding(pads, sum(cut))
    options = {"budget": 0.3, "page": PAGE, "recent": 4, "offload": True, "codec": "int4"}
    got = feed(model, ids, lcpatch.RetrievalCache(model, **options), cut, mask)
    for row, skip in enumerate(pads):
        one = lcpatch.RetrievalCache(model, **options)
        alone = feed(model, ids[row : row + 1, skip:], one, [cut[0] - skip, *cut[1:]])
        assert distance(got[row : row + 1, skip:], alone) <= model_budget(model, ids)


def test_a_share_of_the_row_grows_with_it():
    model = build()
    cache = lcpatch.RetrievalCache(model, 0.5, page=4, recent=4)
    for length in (100, 200):
        cache.reset()
        model.generate(tokens(1, length), max_new_tokens=3, do_sample=False, past_key_values=cache)
        assert cache.stats()["attended"] == length // 2 // 4 * 4


@pytest.mark.parametrize("name", ["cluster", "retrieval", "tiered"])
def test_autocast(name):
    """Rotary embeddings leave queries in fp32 beside values in bf16; with room for everything nothing else happens."""
    model, ids, cut = build(), tokens(2, LENGTH), [50, 20, *[1] * 20]
    with torch.autocast("cpu", torch.bfloat16):
        small = feed(model, ids, make(name, model, small=True), cut)
        got = feed(model, ids, make(name, model), cut)
        want = feed(model, ids, DynamicCache(config=model.config), cut)
    exact = feed(model, ids, DynamicCache(config=model.config), cut)
    assert small.isfinite().all()
    assert distance(got, want) <= 2 * distance(want, exact)


def test_layers_with_a_pattern_follow_it():
    """A sparse layer's tokens read what their pattern says, of everything."""
    model, ids = make_model("s2"), tokens(2, LENGTH)
    small, full = (feed(model, ids, make("retrieval", model, small=s), [50, *[1] * 40]) for s in (True, False))
    assert distance(small, full) <= model_budget(build(), ids)


# Scorers.


def test_untrained_bookmarks_are_means():
    keys, q = randn(2, 3, 40, 8).float(), randn(2, 6, 1, 8, seed=1).float()
    bookmarks = Bookmarks(2, 3, 8)
    mean = Mean().score(q, Mean().summarise(keys, PAGE))
    for scorer in (Bookmark(), bookmarks.scorer(1)):
        assert torch.equal(scorer.score(q, scorer.summarise(keys, PAGE)), mean)
    assert (
        distance(bookmarks.scores(0, q, keys, PAGE)[:, :, 0], mean)
        <= 32 * torch.finfo(torch.float32).eps * mean.abs().max()
    )
    assert distance(Quest().score(q, Quest().summarise(keys, PAGE)), mean) > 1


def test_bookmarks_learn_to_find_a_page(tmp_path):
    """Queries ask for a page by another direction than its mean: trained, saved and loaded, it comes first."""
    torch.manual_seed(0)
    keys, turn = torch.randn(1, 2, 20 * PAGE, 8), torch.linalg.qr(torch.randn(8, 8))[0]
    mean = keys.unflatten(2, (-1, PAGE)).mean(3).repeat_interleave(2, 1)
    query, want = 3 * mean @ turn, torch.arange(20).expand(1, 4, -1)
    bookmarks = Bookmarks(1, 2, 8)

    def found(bookmarks):
        return float((bookmarks.scores(0, query, keys, PAGE).argmax(-1) == want).float().mean())

    before = found(bookmarks)
    optimiser = torch.optim.Adam(bookmarks.parameters(), 0.05)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(bookmarks.scores(0, query, keys, PAGE).flatten(0, 2), want.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before < 0.4
    assert found(bookmarks) > 0.9
    bookmarks.save(tmp_path / "bookmarks.safetensors")
    loaded = Bookmarks.load(tmp_path / "bookmarks.safetensors")
    assert torch.equal(loaded.query, bookmarks.query)
    assert torch.equal(loaded.key, bookmarks.key)
    scorer = loaded.scorer(0)
    one = query[:, :, 7:8]
    got = scorer.score(one, scorer.summarise(keys, PAGE))
    assert (
        distance(got, bookmarks.scores(0, one, keys, PAGE)[:, :, 0])
        <= 1e3 * torch.finfo(torch.float32).eps * got.abs().max()
    )


def test_bookmarks_of_a_model():
    model = build()
    bookmarks = Bookmarks.of(model)
    torch.nn.init.normal_(bookmarks.key)
    ids, cut = tokens(2, LENGTH), [50, *[1] * 40]
    options = {"budget": 24, "page": 4, "recent": 4}
    plain, trained = (
        feed(model, ids, lcpatch.RetrievalCache(model, scorer=s, **options), cut) for s in ("mean", bookmarks)
    )
    assert torch.equal(plain[:, :50], trained[:, :50])
    assert distance(plain, trained) > 100 * model_budget(model, ids)


def test_files_that_are_not_bookmarks(tmp_path):
    from safetensors.torch import save_file

    other, torn = tmp_path / "other.safetensors", tmp_path / "torn.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, other)
    Bookmarks(1, 1, 4).save(torn)
    torn.write_bytes(torn.read_bytes()[:-7])
    for path, message in [(other, "not bookmarks"), (torn, "cannot be read"), (tmp_path / "none", "cannot be read")]:
        with pytest.raises(lcpatch.LcpatchError, match=message):
            Bookmarks.load(path)


def test_a_scorer_of_ones_own():
    class Last:
        """The page's last key."""

        def summarise(self, keys, page):
            return (keys.unflatten(2, (-1, page))[..., -1, :],)

        def score(self, query, summary):
            return lcpatch_kernels.page_scores(query, *summary)

    model = build()
    cache = lcpatch.RetrievalCache(model, 24, scorer=Last, page=4, recent=4)
    assert model.generate(tokens(2, 60), max_new_tokens=5, past_key_values=cache).shape == (2, 65)


def test_the_scorers_are_registered():
    assert set(scorers.all()) == {"quest", "mean", "bookmark"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"page": 48}, ValueError, "page=48 must be a power of two"),
        ({"page": True}, ValueError, "page=True must be a power of two"),
        ({"dense_layers": -1}, ValueError, "dense_layers=-1 must be an integer >= 0"),
        ({"recent": 0}, ValueError, "recent=0 must be"),
        ({"budget": 170}, ValueError, "at least 176 with page=16"),
        ({"budget": np.int64(170)}, ValueError, "at least 176 with page=16"),
        ({"codec": "int2", "offload": True}, ValueError, "codec='int2' is not one of"),
        ({"codec": "int8"}, ValueError, "codec='int8' is how pages lie in host memory, .* give offload=True"),
        ({"group": "mean"}, ValueError, "group='mean' is not one of"),
        ({"scorer": "quset"}, lcpatch.UnknownNameError, "Did you mean 'quest'"),
        ({"scorer": 3}, ValueError, "scorer=3 must be one of"),
        ({"scorer": Bookmarks(5, 3, 16)}, ValueError, "bookmarks are of 5 layers, the model has 2"),
    ],
)
def test_what_cannot_work_says_why(options, error, message):
    with pytest.raises(error, match=message):
        lcpatch.RetrievalCache(build(), **options)
