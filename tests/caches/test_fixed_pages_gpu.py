"""Generating from pages on a GPU: compiled by `generate` itself, replayed as a CUDA graph, and nothing waits."""

import pytest
import torch
from cache_cases import feed
from models import build, tokens
from noise import distance, model_budget

import lcpatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"budget": 96, "attend": 64, "page": 8, "recent": 8}


CACHES = {
    "as it is": lambda model, **more: lcpatch.TieredCache(model, **SMALL, codec=None, **more),
    "int8": lambda model, **more: lcpatch.TieredCache(model, **SMALL, codec="int8", **more),
    "int4": lambda model, **more: lcpatch.TieredCache(model, **SMALL, codec="int4", **more),
    "retrieval": lambda model, **more: lcpatch.RetrievalCache(model, 64, page=8, recent=8, scorer="quest", **more),
    "retrieval, mean": lambda model, **more: lcpatch.RetrievalCache(
        model, 64, page=8, recent=8, scorer="mean", group="softmax", **more
    ),
    "retrieval, offloaded": lambda model, **more: lcpatch.RetrievalCache(
        model, 64, page=8, recent=8, offload=True, **more
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_generate_compiles_once_and_skips_no_graph(name):
    from torch._dynamo.utils import counters

    model, ids = build(**SIZES, pad_token_id=None).cuda(), tokens(2, 150).cuda()  # a 0 that was generated is no padding
    options = {"max_new_tokens": 60, "do_sample": False}
    torch._dynamo.reset()
    counters.clear()
    make = CACHES[name]
    want = model.generate(ids, past_key_values=make(model), **options)
    cache = make(model, compiled=True)
    got = model.generate(ids, past_key_values=cache, **options)
    places = [x.data_ptr() for layer in cache.layers for x in layer.pages.tensors]
    # A near-tie may fall otherwise in another kernel; then all that follows differs, but not from the first token on.
    assert (got == want).float().mean() > 0.75
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    model.generate(torch.cat([got, tokens(2, 21, seed=3).cuda()], 1), past_key_values=cache, **options)
    assert [x.data_ptr() for layer in cache.layers for x in layer.pages.tensors] == places
    model.generate(ids, past_key_values=make(model, compiled=True), **options)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("name", ["as it is", "retrieval", "retrieval, mean"])
def test_uncompiled_it_is_the_one_on_a_cpu(name):
    model, ids = build(**SIZES), tokens(2, 200)
    budget, cut = model_budget(model, ids), [150, *[1] * 50]
    want = feed(model, ids, CACHES[name](model), cut)
    lcpatch.remove(model)
    model.cuda()
    for compiled in (False, True):
        cache = CACHES[name](model, compiled=compiled)
        assert distance(feed(model, ids.cuda(), cache, cut).cpu(), want) <= budget


def test_a_step_waits_for_nothing():
    """Between two full pages, not even to learn what was missing."""
    model, ids = build(**SIZES).cuda(), tokens(2, 170).cuda()
    cache = lcpatch.TieredCache(model, **SMALL)
    feed(model, ids[:, :162], cache, [150, *[1] * 12])
    layer = cache.layers[0]
    position = {"position_ids": torch.full((2, 1), 162, device="cuda")}
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, 162:163], past_key_values=cache, **position)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert layer.pages.traffic()["missed"] > 0
