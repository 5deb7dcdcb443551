"""Models whose layers differ in kind: those that attend to their whole past get a layer of ours, however it is said."""

import warnings

import pytest
import torch
from cache_cases import ALL, LENGTH, feed, make, make_model
from models import tokens
from noise import distance, model_budget
from odd_models import make as odd

import lcpatch


@pytest.mark.parametrize("prefix", ["Exaone4", "Lfm2"])
@pytest.mark.parametrize("name", ALL)
def test_with_room_for_everything_the_logits_are_those_of_a_full_cache(name, prefix):
    model = odd(prefix).eval()
    ids = tokens(1, LENGTH)
    budget = model_budget(model, ids)
    model = make_model(name, model)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert distance(feed(model, ids, make(name, model), [60, 1, 1, 20, 8]), want) <= budget


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
