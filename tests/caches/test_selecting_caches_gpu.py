"""Cluster, retrieval and tiered caches on a GPU: they compute what the CPU computes, and memory is where they say."""

import gc

import pytest
import torch
from cache_cases import feed, left_padding, make
from models import build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
from lcpatch.caches.tiers import TieredPages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("cluster", "retrieval", "tiered")
LENGTH = 300
CUT = [200, 1, 1, 30, *[1] * 68]
PADS = [0, 117, 11]
LARGE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4}


@pytest.mark.parametrize("name", NAMES)
def test_small_budgets_give_what_they_give_on_a_cpu(name):
    model, ids, mask = build("llama"), tokens(3, LENGTH), left_padding(PADS, LENGTH)
    budget = model_budget(model, ids)
    want = feed(model, ids, make(name, model, small=True), CUT, mask)
    lcpatch.remove(model)
    model.cuda()
    got = feed(model, ids.cuda(), make(name, model, small=True), CUT, mask.cuda())
    assert distance(got[mask.bool().cuda()].cpu(), want[mask.bool()]) <= budget


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_everything_in_half_precision(name, offload):
    """Twice the distance between two dense implementations, in bf16 with heads of 64."""
    if offload and name != "retrieval":
        pytest.skip("an option of the retrieval cache")
    model = build("llama", **LARGE).cuda().bfloat16()
    ids = tokens(2, 1500).cuda()
    cut = [1000, *[1] * 20, 400, *[1] * 80]
    want = feed(model, ids, DynamicCache(config=model.config), cut)
    model.set_attn_implementation("eager")
    other = feed(model, ids, DynamicCache(config=model.config), cut)
    model.set_attn_implementation("sdpa")
    options = {"offload": True} if offload else {}
    got = feed(model, ids, make(name, model, **options), cut)
    assert distance(got, want) <= 2 * distance(other, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generate_gives_a_batch_what_it_gives_its_rows(name, options):
    model = build("llama").cuda()
    ids, mask = tokens(3, 150).cuda(), left_padding(PADS, 150).cuda()
    options = {"max_new_tokens": 30, "do_sample": False, **options}
    got = model.generate(ids, attention_mask=mask, past_key_values=make(name, model, small=True), **options)
    for row, pads in enumerate(PADS):
        alone = model.generate(ids[row : row + 1, pads:], past_key_values=make(name, model, small=True), **options)
        assert torch.equal(got[row, pads:], alone[0])


@pytest.mark.parametrize("budget", [0.5, 0.2])
def test_what_is_merged_is_freed(budget):
    """`memory()` against the allocator, to what its blocks round."""
    model = build("llama", **LARGE).cuda().bfloat16()
    ids = tokens(1, 8000).cuda()
    feed(model, ids, lcpatch.ClusterCache(model, budget), [4000] * 2)  # compiles
    held = {}
    for name, cache in (("full", DynamicCache(config=model.config)), ("cluster", lcpatch.ClusterCache(model, budget))):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            for part in ids.split(4000, 1):
                model(part, past_key_values=cache, logits_to_keep=1)
        held[name] = torch.cuda.memory_allocated() - before
    assert abs(held["cluster"] - cache.memory()["device"]) <= 64 * 512 + (1 << 16)
    assert held["cluster"] <= (budget * (1 + 12 / 256) + 0.05) * held["full"]


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("codec", [None, "int8"])
def test_tiers(disk, codec, tmp_path):
    """Pages come from pinned memory on a stream of their own, and are what they were."""
    model, ids = build("llama", **LARGE).cuda().bfloat16(), tokens(2, 1500).cuda()
    options = {"budget": 512, "page": 16, "recent": 64, "codec": codec}
    folder = {"disk": str(tmp_path), "host_bytes": 1 << 20} if disk else {}
    cut = [1400, *[1] * 100]
    cache = lcpatch.TieredCache(model, **options, **folder, ahead=True)
    ahead = feed(model, ids, cache, cut)
    plain = feed(model, ids, lcpatch.TieredCache(model, **options), cut)
    pages = cache.layers[0].pages
    assert isinstance(pages, TieredPages)
    assert disk or all(block.is_pinned() for block in pages.home.store.blocks)
    assert cache.stats()["fetched_ahead"] > 0
    if codec is None:
        assert torch.equal(ahead, plain)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.pages.keys, layer.pages.values))
    assert held == 2 * 4 * 2 * 2 * (512 + 16) * 64 * 2
