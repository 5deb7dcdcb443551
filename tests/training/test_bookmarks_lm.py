"""Bookmarks learn from the language-model loss: of tokens read as the cache reads them, by an exact gradient."""

from itertools import count

import pytest
import torch
from cache_cases import feed, randn, step
from models import build, tokens
from torch.nn import functional as F

import lcpatch
from lcpatch.caches.reads import Reads
from lcpatch.caches.scorers import Bookmarks
from lcpatch.training import bookmarks_lm
from lcpatch.training.bookmarks_lm import measure_reading, reading_loss, tune_bookmarks

PAGES = {"budget": 24, "page": 4, "num_sinks": 4, "recent": 4}
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # plain, with a softcap, with learnt sinks; the latter two have windows too
windows = pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")


def shaken(model, seed=0):
    """Bookmarks that score badly."""
    bookmarks, rng = Bookmarks.of(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bookmarks.key += torch.randn(bookmarks.key.shape, generator=rng)
        bookmarks.query += 0.1 * torch.randn(bookmarks.query.shape, generator=rng)
    return bookmarks


@windows
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [24, 0.4])
def test_the_loss_is_that_of_tokens_which_a_retrieval_cache_reads(family, budget):
    model, ids = build(family), tokens(2, 90)
    bookmarks = shaken(model)
    cache = lcpatch.RetrievalCache(model, budget, scorer=bookmarks, page=4, num_sinks=4, recent=4)
    logits = feed(model, ids, cache, [67, *[1] * 23])[:, 67:-1]
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 68:].flatten())
    lcpatch.remove(model)
    got = measure_reading(model, [ids], bookmarks, **PAGES | {"budget": budget}, num_queries=23)
    assert abs(got - want) < 1e-5 * want
    full = measure_reading(model, [ids], Bookmarks.of(model), **PAGES | {"budget": budget}, num_queries=23)
    assert abs(full - want) > 1e-3  # the choice matters


def check_gradient(loss, parameters, monkeypatch):
    """Against finite differences in float64 of what straight-through differentiates: the choice and its shares held
    fast, plus what the sigmoids change."""
    relax, held, calls = bookmarks_lm.relax, [], count()

    def holding(chosen, soft, mass):
        weight = relax(chosen, soft, mass)
        share = torch.where(chosen > 0, 1, 1 / (1 + mass / (chosen * mass).sum(-1, keepdim=True)))
        held.append((weight, soft, share))
        return weight

    def relaxed(chosen, soft, mass):
        weight, before, share = held[next(calls) % len(held)]
        return weight + share * (soft - before)

    got = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        monkeypatch.setattr(bookmarks_lm, "relax", holding)
        loss()
        monkeypatch.setattr(bookmarks_lm, "relax", relaxed)
        rng, eps = torch.Generator().manual_seed(3), 1e-6
        for parameter, gradient in zip(parameters, got, strict=True):
            assert gradient.norm() > 1e-3
            for _ in range(3):
                way = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                ends = []
                for side in (eps, -2 * eps):
                    parameter += side * way
                    ends.append(loss())
                parameter += eps * way
                slope = (ends[0] - ends[1]) / (2 * eps)
                assert abs(slope - (gradient * way).sum()) < 1e-6 * gradient.norm() * way.norm()


def test_the_gradient_of_the_models_loss(monkeypatch):
    """GPT-NeoX computes in float64 throughout; a norm of Llama's kind rounds to fp32."""
    model = build("gpt_neox", num_key_value_heads=4).double()
    bookmarks, ids = shaken(model).double(), tokens(2, 70)
    with bookmarks_lm.lent(model):
        check_gradient(
            lambda: reading_loss(model, ids, bookmarks, Reads(24, 4, 4, 4), 12),
            list(bookmarks.parameters()),
            monkeypatch,
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_of_one_layer(softcap, monkeypatch):
    """Of its output and its LSE, several query heads a KV head, in the bookmarks and in what layers below hand on."""
    bookmarks = Bookmarks(1, 2, 8).double()
    torch.nn.init.normal_(bookmarks.key, std=0.5)
    q, k, v = randn(1, 4, 70, 8), randn(1, 2, 70, 8, seed=1), randn(1, 2, 70, 8, seed=2)
    new = [x[:, :, 58:].clone().requires_grad_() for x in (q, k, v)]
    of_out, of_lse = randn(1, 4, 12, 8, seed=3), randn(1, 4, 12, seed=4)

    def loss():
        layer = bookmarks_lm._ReadingLayer(0, bookmarks, Reads(24, 4, 4, 4))
        with torch.no_grad():
            step(layer, *(x[:, :, :58] for x in (q, k, v)), softcap=softcap)
        out, lse = step(layer, *new, softcap=softcap)
        return (out * of_out).sum() + (lse * of_lse).sum()

    check_gradient(loss, [*bookmarks.parameters(), *new], monkeypatch)


def test_the_loss_falls_and_nothing_but_the_bookmarks_learns():
    """On one text over and over; a model of random weights has nothing to teach about another."""
    model, ids = build(initializer_range=0.3), tokens(4, 100)
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    bookmarks, seen = Bookmarks.of(model), []
    begun = measure_reading(model, [ids], bookmarks, **PAGES, num_queries=24)
    got = tune_bookmarks(
        model, [ids] * 30, bookmarks, **PAGES, num_queries=24, lr=0.01, say=lambda *what: seen.append(what)
    )
    losses = torch.tensor([loss for _, loss in seen])
    assert [step for step, _ in seen] == list(range(30))
    assert abs(losses[0] - begun) < 1e-5
    assert losses[-5:].mean() < 0.95 * losses[:5].mean()
    assert measure_reading(model, [ids], got, **PAGES, num_queries=24) < 0.95 * begun

    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_training_goes_on_from_a_file(tmp_path):
    model = build()
    once = tune_bookmarks(model, [tokens(1, 90)], Bookmarks.of(model), **PAGES)
    once.save(tmp_path / "b.safetensors")
    loaded = Bookmarks.load(tmp_path / "b.safetensors")
    again = [tune_bookmarks(model, [tokens(1, 90, seed=2)], x, **PAGES).key for x in (once, loaded)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], Bookmarks.of(model).key)


def test_texts_that_leave_nothing_out():
    model = build()
    with pytest.raises(ValueError, match=r"a text of 87 tokens, the last 64 of which read .* give at least 88"):
        tune_bookmarks(model, [tokens(1, 87)], Bookmarks.of(model), **PAGES)
    with pytest.raises(ValueError, match="num_queries=1 must be at least 2"):
        tune_bookmarks(model, [tokens(1, 87)], Bookmarks.of(model), **PAGES, num_queries=1)
    with pytest.raises(ValueError, match=r"bookmarks of 1 layers, 2 KV heads of 8 .* has 2 layers, 3 KV heads of 16"):
        tune_bookmarks(model, [tokens(1, 100)], Bookmarks(1, 2, 8), **PAGES)
    model = lcpatch.apply(build(), "sink", num_sinks=2, window=9)
    with pytest.raises(ValueError, match="every layer follows a pattern"):
        tune_bookmarks(model, [tokens(1, 100)], Bookmarks.of(model), **PAGES)


@windows
def test_windows_are_left_out():
    model = build("gemma3_text")
    tuned = tune_bookmarks(model, [tokens(1, 100)], Bookmarks.of(model), **PAGES)
    assert [not torch.equal(x, torch.eye(16).expand_as(x)) for x in tuned.query] == [True, False, True]
