"""Bookmarks learn from the model's own attention, which stays as it is; what they learn shows in a retrieval cache."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_cases import feed
from models import build, tokens
from test_chunkwise_models import gemma4
from transformers import DynamicCache

import lcpatch
from lcpatch.caches.scorers import Bookmarks
from lcpatch.core.errors import TrainingError
from lcpatch.hf.models import attention_modules
from lcpatch.training.bookmarks import Lesson, measure_bookmarks, train_bookmarks

ROOT = Path(__file__).parents[2]
PAGES = {"page": 4, "num_sinks": 4, "recent": 4}


def texts(steps, length=120):
    return [tokens(2, length, seed=n) for n in range(steps)]


def test_their_shape_is_that_of_the_layers_that_read_pages():
    """Gemma 4's layers with a window have other KV heads. Untrained, bookmarks are means."""
    model = gemma4(attention_k_eq_v=True, num_global_key_value_heads=1).eval()
    assert Bookmarks.of(model).query.shape == (4, 1, 32, 32)
    ids = tokens(1, 60) % model.config.vocab_size
    caches = (lcpatch.RetrievalCache(model, 16, scorer=s, **PAGES) for s in ("mean", Bookmarks.of(model)))
    one, other = (feed(model, ids, cache, [50, *[1] * 10]) for cache in caches)
    assert torch.equal(one, other)


def test_layers_of_several_shapes_have_no_bookmarks(monkeypatch):
    model = build()
    monkeypatch.setattr(next(iter(attention_modules(model).values())), "head_dim", 7)
    with pytest.raises(lcpatch.UnsupportedModelError, match="3 KV heads of 7 and 3 KV heads of 16 numbers"):
        Bookmarks.of(model)


def test_pages_with_much_attention_come_to_score_high():
    """Begun badly: a model of random weights has nothing to teach that its mean keys do not say."""
    model = build()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    bad = Bookmarks.of(model)
    with torch.no_grad():
        bad.key += torch.randn(bad.key.shape, generator=torch.Generator().manual_seed(0))
    seen = []
    trained = train_bookmarks(
        model, texts(40), bookmarks=copy.deepcopy(bad), **PAGES, lr=0.03, say=lambda *what: seen.append(what)
    )
    losses, recalls = (torch.tensor([row[n] for row in seen]) for n in (1, 2))
    assert losses[-8:].mean() < losses[:8].mean()
    assert recalls[-8:].mean() > recalls[:8].mean()
    held_out = [tokens(2, 120, seed=n) for n in range(50, 54)]
    (loss, recall), (bad_loss, bad_recall) = (measure_bookmarks(model, held_out, b, **PAGES) for b in (trained, bad))
    assert loss < bad_loss
    assert recall > bad_recall
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())

    ids, cut = tokens(2, 120, seed=99), [80, *[1] * 40]
    want = feed(model, ids, DynamicCache(config=model.config), cut).log_softmax(-1)

    def far(scorer):
        """How far tokens that read by `scorer` are from those that read everything."""
        cache = lcpatch.RetrievalCache(model, 24, scorer=scorer, page=4, recent=4)
        return (want.exp() * (want - feed(model, ids, cache, cut).log_softmax(-1))).sum(-1)[:, 80:].mean()

    assert far(trained) < far(bad)


def test_the_loss_is_the_cross_entropy_of_attention_over_pages():
    """Against a loop over queries and pages, for one layer; the gradient by autograd through that."""
    from lcpatch.hf.state import own_spec
    from lcpatch.hf.watch import Call

    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 60, 8, generator=rng) for h in (4, 2))
    bookmarks = Bookmarks(1, 2, 8)
    torch.nn.init.normal_(bookmarks.key, std=0.3)
    lesson = Lesson(bookmarks, 4, 4, 4, 7, 3)
    lesson.learn(0, Call(q, k, k, own_spec(4, None), None, None, None, "auto"))
    got = bookmarks.key.grad.clone(), bookmarks.query.grad.clone()

    bookmarks.zero_grad()
    position = torch.randint(lesson.least - 1, 60, (7,), generator=torch.Generator().manual_seed(3)).tolist()
    loss, mass = 0, 0
    for head in range(4):
        keys = k[0, head // 2]
        for i in position:
            p = (q[0, head, i] @ keys[: i + 1].T * 8**-0.5).softmax(-1)
            pages = range(1, (i - 4) // 4)
            share = torch.stack([p[4 * n : 4 * n + 4].sum() for n in pages])
            means = torch.stack([keys[4 * n : 4 * n + 4].mean(0) for n in pages]) @ bookmarks.key[0, head // 2]
            scores = means @ (q[0, head, i] @ bookmarks.query[0, head // 2]) * 8**-0.5
            loss, mass = loss - (share * scores.log_softmax(-1)).sum(), mass + share.sum()
    (loss / mass).backward()
    assert torch.allclose(lesson.losses[0], (loss / mass).detach(), rtol=1e-5)
    for x, y in zip(got, (bookmarks.key.grad, bookmarks.query.grad), strict=True):
        assert (x - y).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * y.abs().max()


def test_windows_and_patterns_are_left_out():
    model = build("gemma3_text")
    with pytest.warns(UserWarning, match="keep transformers' own cache"):
        bookmarks = train_bookmarks(model, texts(1), **PAGES)
    changed = [not torch.equal(x, torch.eye(16).expand_as(x)) for x in bookmarks.query]
    assert changed == [True, False, True]
    model = lcpatch.apply(build(), "sink", num_sinks=2, window=9)
    with pytest.raises(ValueError, match="every layer follows a pattern"):
        train_bookmarks(model, texts(1), **PAGES)


def test_a_text_without_pages_to_choose():
    model = build()
    with pytest.raises(ValueError, match="a text of 15 tokens has no page to choose; give 16"):
        train_bookmarks(model, texts(1, 15), **PAGES)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [{"page": 0}, {"recent": -1}, {"num_sinks": -1}])
def test_pages_that_are_none(wrong):
    (name, value), model = *wrong.items(), build()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        train_bookmarks(model, texts(1), **PAGES | wrong)


def test_bookmarks_that_are_no_numbers_are_not_returned():
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1; take a lower learning rate than 1e\+30"):
        train_bookmarks(build(), texts(3), **PAGES, lr=1e30)


@pytest.mark.slow
def test_the_recipe(base, tmp_path):
    """As a program: trained on text files, measured on rows it has not seen, saved where it was asked to; and on from
    there with one stage alone."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the man " * 200)
    out, second = tmp_path / "bookmarks.safetensors", tmp_path / "second.safetensors"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))

    def run(*words):
        words = [*words, "--model", base, "--data", text, "--length", 120, "--page", 4, "--recent", 4, "--budget", 16]
        command = [sys.executable, ROOT / "recipes" / "retrieval.py", *words, "--steps", 3, "--held-out", 2]
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("--out", out, "--stage", "both")
    assert [said.count(x) for x in ("held out", "lm loss", "stage contrastive", "stage lm")] == [3, 3, 1, 1]
    said = run("--out", second, "--bookmarks", out, "--stage", "lm")
    assert [said.count(x) for x in ("held out", str(out), "stage contrastive", "stage lm")] == [3, 1, 0, 1]
    first, then = Bookmarks.load(out), Bookmarks.load(second)
    assert first.query.shape[0] == 2
    assert not torch.equal(first.query, then.query)
