"""Models whose layers differ in kind: those that attend to their whole past get a layer of ours, however it is said."""

import warnings

import pytest
import torch
import transformers
from cache_cases import ALL, LENGTH, feed, make, make_model
from models import tokens
from noise import distance, model_budget
from odd_models import SIZES
from odd_models import make as odd

import lcpatch
from lcpatch.caches.tiered import page_sizes


@pytest.mark.parametrize("prefix", ["Exaone4", "Lfm2", "ModernBertDecoder"])
@pytest.mark.parametrize("name", ALL)
def test_with_room_for_everything_the_logits_are_those_of_a_full_cache(name, prefix):
    model = odd(prefix).eval()
    ids = tokens(1, LENGTH)
    budget = model_budget(model, ids)
    model = make_model(name, model)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert distance(feed(model, ids, make(name, model), [60, 1, 1, 20, 8]), want) <= budget


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
def test_what_runs_without_logits_finds_the_decoder():
    """Where transformers' `get_decoder` gives the matrix of the logits."""
    model, ids = odd("ModernBertDecoder").eval(), tokens(1, 200)
    ahead, whole = (lcpatch.H2OCache(model, budget=4096) for _ in range(2))
    ahead.read(ids, chunk=1000)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(model.generate(ids, past_key_values=cache, **options) for cache in (ahead, whole)))
    assert page_sizes(model, ids, 0.4, pages=(4,), recent=4) == [32, 4]


def test_reading_ahead_computes_no_logits():
    """Where transformers' `get_decoder` gives the whole model."""
    own = {"intermediate_size_mlp": 40, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(**SIZES, head_dim=16, layer_types=["full_attention"] * 2, **own)
    model = transformers.Llama4ForCausalLM(config).eval()
    heads = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    cache = lcpatch.H2OCache(model, budget=24)
    cache.read(tokens(1, 40))
    assert cache.get_seq_length() == 39
    assert not heads


def test_a_page_size_is_given_for_every_layer_of_the_model():
    model = odd("Lfm2").eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* keep transformers' own cache")
        cache = lcpatch.TieredCache(model, 48, page=[4, 8], recent=4)
    assert cache.layers[1].pages.page == 8


def test_a_layer_that_a_patch_leaves_dense_keeps_no_window():
    model = odd("Exaone4", num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"]).eval()
    lcpatch.apply(model, "s2", block_size=16, local_blocks=1, stride=2, layers=[0])
    cache = lcpatch.S2Cache(model)
    feed(model, tokens(1, LENGTH), cache, [LENGTH])
    assert cache.layers[1].keys.shape[2] == LENGTH
