"""Learnable sinks beside caches that attend by themselves: no cache holds them, and every token still sees them."""

import pytest
import torch
from cache_cases import ALL, feed, left_padding, make
from models import SHORT, attention_layers, build, tokens
from noise import distance, model_budget
from torch import nn
from transformers import DynamicCache

import lcpatch
from lcpatch.caches.budget import Budget
from lcpatch.caches.h2o import H2OLayer
from lcpatch.hf.sinks import sinks_of
from lcpatch.hf.state import SINK_VALUE, own_spec
from lcpatch.hf.watch import Call, ask

WINDOW, SINKS = 24, 4


def sunk(method: str, sinks: str = "prefix:3", **settings):
    """A patched model whose learnable sinks are as if trained."""
    model = lcpatch.apply(build(), method, sinks=sinks, **settings)
    torch.manual_seed(3)
    for layer in attention_layers(model):
        for parameter in sinks_of(layer).values():
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ALL)
def test_with_room_for_everything_a_cache_is_a_full_one(name: str):
    """Left-padded rows, a prompt in two chunks, then tokens one by one."""
    settings = SHORT["s2"] if name == "s2" else {**SHORT["sink"], "mode": "never"}
    model = sunk("s2" if name == "s2" else "sink", **settings)
    ids, mask = tokens(3, 60), left_padding([0, 37, 11], 60)
    sizes = [30, 22, *[1] * 8]
    want = feed(model, ids, DynamicCache(config=model.config), [60], mask)
    got = feed(model, ids, make(name, model), sizes, mask)
    allowed = model_budget(build(), ids)
    assert distance(got[mask.bool()], want[mask.bool()]) <= allowed
    nn.init.zeros_(getattr(attention_layers(model)[1], SINK_VALUE))
    assert distance(feed(model, ids, make(name, model), sizes, mask)[mask.bool()], want[mask.bool()]) > 100 * allowed


def test_an_evicting_cache_sees_what_it_keeps_and_the_sinks():
    """Tokens fed one by one see the first ones, the window and the prefix sinks, as under the pattern `sink`."""
    ids = tokens(2, 50)
    pattern = sunk("sink", num_sinks=SINKS, window=WINDOW - SINKS + 1)
    with torch.no_grad():
        want = pattern(ids, use_cache=False).logits
    model = sunk("sink", mode="never")
    cache = lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS, positions="absolute")
    allowed = model_budget(build(), ids)
    assert distance(feed(model, ids, cache, [1] * 50), want) <= allowed
    assert cache.stats()["kept"] == WINDOW


def test_h2o_counts_what_tokens_are_given_without_the_share_of_the_sinks():
    heads, kv_heads, num, dim = 6, 3, 20, 16
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, num, dim, generator=rng, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    sinks = torch.randn(1, heads, num, generator=rng, dtype=torch.float64) + 1
    scores = (q @ k.repeat_interleave(2, 1).mT) * dim**-0.5
    scores = scores.masked_fill(torch.ones(num, num).triu(1).bool(), -torch.inf)
    given = torch.cat([scores, sinks[..., None]], -1).softmax(-1)[..., :-1].sum(2)
    want = given.unflatten(1, (kv_heads, 2)).sum(2)
    masses = []
    for told in (sinks, None):
        layer = H2OLayer(Budget(64, 0), None, score="sum", decay=0.9, group="sum", grace=0)
        layer.expected = True
        layer.update(k, v)
        out, _ = ask(layer, Call(q, k, v, own_spec(heads, None), None, None, None, "auto", told))
        masses.append(layer.slots["mass"][..., :num].double())
        assert distance(out, scores.softmax(-1) @ v.repeat_interleave(2, 1)) <= num * torch.finfo(q.dtype).eps * 8
    allowed = num * torch.finfo(torch.float32).eps * float(want.max())
    assert distance(masses[0], want) <= allowed
    assert distance(masses[1], want) > 1e4 * allowed


def test_h2o_with_sinks_in_a_padded_batch():
    """A row of a batch keeps, and says, what it does alone."""
    model = sunk("sink", mode="never")
    ids, mask = tokens(2, 72), left_padding([0, 37], 72)
    sizes = [60, *[1] * 12]
    got = feed(model, ids, lcpatch.H2OCache(model, budget=20), sizes, mask)[1, 37:]
    alone = feed(model, ids[1:, 37:], lcpatch.H2OCache(model, budget=20), [23, *sizes[1:]])[0]
    assert distance(got, alone) <= model_budget(build(), ids)
