"""Caches on disk: continuing a loaded one is continuing the saved one to the bit; another model's is refused."""

import copy

import numpy as np
import pytest
import torch
from cache_cases import ALL, feed, make, make_model
from models import build, tokens
from store_cases import continued, rewritten, saved
from transformers import Lfm2Config, Lfm2ForCausalLM

import lcpatch
from lcpatch.caches.prefix_file import read_header


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_loaded_cache_goes_on_as_the_saved_one(name, small, tmp_path):
    path, cache, model, text = saved(name, tmp_path, small)
    other = make_model(name)
    loaded = lcpatch.load_cache(path, other)
    assert type(loaded) is type(cache)
    assert loaded.get_seq_length() == 80
    assert loaded.memory() == cache.memory()
    assert torch.equal(continued(other, loaded, *text), continued(model, cache, *text))
    first, second = loaded.stats(), cache.stats()
    assert all(first[key] == second[key] for key in ("seen", "kept", "kept_by_layer"))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_row_that_stood_beside_a_longer_one_is_saved(name, small, tmp_path):
    _, cache, model, (ids, mask) = saved(name, tmp_path, small)
    cache.batch_select_indices(torch.tensor([1]))
    loaded = lcpatch.load_cache(cache.save(tmp_path / "row"), model)
    assert torch.equal(continued(model, loaded, ids[1:], mask[1:]), continued(model, cache, ids[1:], mask[1:]))


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "bf16"])
def test_codecs_are_saved_as_they_lie(codec, tmp_path):
    path, cache, model, text = saved("sink", tmp_path, codec=codec)
    loaded = lcpatch.load_cache(path, model)
    assert torch.equal(continued(model, loaded, *text), continued(model, cache, *text))


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
def test_layers_with_a_window_are_saved_too(tmp_path):
    model = build("gemma3_text")
    path, cache, model, text = saved("h2o", tmp_path, model=model)
    loaded = lcpatch.load_cache(path, model)
    assert torch.equal(continued(model, loaded, *text), continued(model, cache, *text))


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
def test_a_window_that_held_more_while_steps_were_recorded_is_one_again(tmp_path):
    """Assisted decoding leaves recording on, so a later turn is kept whole."""
    model, ids = make_model("h2o", family="gemma3_text"), tokens(1, 60)
    cache, recording = make("h2o", model), make("h2o", model)
    recording.activate_past_recording()
    for each in (cache, recording):
        feed(model, ids[:, :50], each, [50])
    loaded = lcpatch.load_cache(recording.save(tmp_path / "window"), model)
    assert torch.equal(feed(model, ids[:, 50:], loaded, [1] * 10), feed(model, ids[:, 50:], cache, [1] * 10))


@pytest.mark.parametrize("name", ALL)
def test_a_copy_goes_on_as_the_original(name, tmp_path):
    """What people do with a prefix in memory."""
    _, cache, model, text = saved(name, tmp_path)
    twin = copy.deepcopy(cache)
    assert torch.equal(continued(model, twin, *text), continued(model, cache, *text))


def test_generate_continues_a_loaded_prefix(tmp_path):
    model, ids = make_model("h2o"), tokens(1, 60)
    cache = lcpatch.H2OCache(model, budget=24)
    feed(model, ids, cache, [60])
    path = cache.save(tmp_path / "deep" / "prefix")
    prompt = torch.cat([ids, tokens(1, 9, seed=3)], 1)
    want = model.generate(prompt, past_key_values=cache, max_new_tokens=9, do_sample=False)
    loaded = lcpatch.load_cache(path, model)
    assert torch.equal(model.generate(prompt, past_key_values=loaded, max_new_tokens=9, do_sample=False), want)


# Another model.


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: build(seed=1), "other weights"),
        (lambda: build(num_hidden_layers=3), "another geometry"),
        (lambda: build(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), r"other positions \(RoPE\)"),
        (lambda: build().to(torch.bfloat16), "another dtype"),
        (lambda: lcpatch.apply(build(), "sink"), "another patch"),
        (lambda: build("mistral"), "another kind of model"),
    ],
)
def test_another_model_is_refused(other, what, tmp_path):
    path, *_ = saved("h2o", tmp_path)
    with pytest.raises(lcpatch.StoreError, match=what):
        lcpatch.load_cache(path, other())


def test_an_adapter_makes_another_model(tmp_path):
    peft = pytest.importorskip("peft")
    path, *_ = saved("h2o", tmp_path)
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    with pytest.raises(lcpatch.StoreError, match="other weights"):
        lcpatch.load_cache(path, wrapped)


class Tokenizer:
    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return {word: n for n, word in enumerate(self.words)}


def test_another_tokenizer_is_refused(tmp_path):
    model = make_model("h2o")
    cache = make("h2o", model, small=True)
    feed(model, tokens(1, 40), cache, [40])
    path = cache.save(tmp_path / "prefix", Tokenizer("abc"))
    lcpatch.load_cache(path, model)
    lcpatch.load_cache(path, model, Tokenizer("abc"))
    with pytest.raises(lcpatch.StoreError, match="another tokenizer"):
        lcpatch.load_cache(path, model, Tokenizer("acb"))


# What can be saved.


def test_what_cannot_be_saved_says_why(tmp_path):
    path, cache, *_ = saved("h2o", tmp_path)
    with pytest.raises(lcpatch.StoreError, match="is a folder"):
        cache.save(tmp_path)
    with pytest.raises(lcpatch.StoreError, match="cannot be written"):
        cache.save(path / "below a file")
    cache._model = lambda: None
    with pytest.raises(lcpatch.StoreError, match="is gone"):
        cache.save(path)


def test_a_budget_of_numpys_is_written_as_a_number(tmp_path):
    model = make_model("h2o")
    cache = make("h2o", model, budget=np.int64(24))
    assert lcpatch.load_cache(cache.save(tmp_path / "prefix"), model).options() == {"budget": 24}


def test_an_empty_cache_can_be_saved(tmp_path):
    model = make_model("h2o")
    path = make("h2o", model, small=True).save(tmp_path / "empty")
    assert lcpatch.load_cache(path, model).get_seq_length() == 0


@pytest.mark.parametrize("name", ALL)
def test_a_cache_cropped_to_nothing_can_be_saved(name, tmp_path):
    """Also one whose step was taken back before anything was evicted after it."""
    model, ids = make_model(name), tokens(2, 40)
    for recorded in (False, True):
        cache = make(name, model, small=True)
        for layer in cache.layers if recorded else []:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        feed(model, ids[:, :10], cache, [10])
        cache.crop(-10)
        loaded = lcpatch.load_cache(cache.save(tmp_path / name), model)
        fresh = feed(model, ids, make(name, model, small=True), [30, *[1] * 10])
        assert torch.equal(feed(model, ids, loaded, [30, *[1] * 10]), fresh)


def test_linear_attention_is_counted_and_not_saved(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]}
    model = Lfm2ForCausalLM(Lfm2Config(num_hidden_layers=2, **sizes)).eval()
    with pytest.warns(UserWarning, match=r"layers \[0\] do not attend to their whole past"):
        cache = lcpatch.H2OCache(model, 24)
    feed(model, tokens(1, 40), cache, [40])
    states = cache.layers[0].conv_states.values()
    assert cache.memory()["device"] == cache.layers[1].memory() + sum(x.untyped_storage().nbytes() for x in states)
    with pytest.raises(lcpatch.StoreError, match="layer 0 is a LinearAttentionLayer, which cannot be saved"):
        cache.save(tmp_path / "cache")


def test_where_a_cache_lies_is_for_the_machine_to_choose(tmp_path):
    """A file could else fill a disk, and take all memory, wherever it is loaded."""
    model, ids = make_model("tiered"), tokens(1, 60)
    cache = make("tiered", model, small=True, disk=tmp_path, host_bytes=0)
    feed(model, ids[:, :50], cache, [50])
    path = cache.save(tmp_path / "cache")
    assert read_header(path)["options"].keys().isdisjoint({"disk", "host_bytes"})
    loaded, on_disk = lcpatch.load_cache(path, model), lcpatch.load_cache(path, model, disk=tmp_path)
    want = feed(model, ids[:, 50:], cache, [1] * 10)
    for x in (loaded, on_disk):
        assert torch.equal(feed(model, ids[:, 50:], x, [1] * 10), want)
    assert "disk" not in loaded.memory()
    assert on_disk.memory()["disk"] > 0
    with pytest.raises(lcpatch.LcpatchError, match="give a folder that is there"):
        lcpatch.load_cache(path, model, disk=tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be chosen for a tiered cache, only: disk, host_bytes"):
        lcpatch.load_cache(path, model, budget=12)
    for options, words in (
        ({"disk": str(tmp_path)}, "for this machine to choose"),
        ({"budget": -1}, "must be"),
    ):
        changed = rewritten(path, lambda h, options=options: h | {"options": h["options"] | options})
        with pytest.raises(lcpatch.StoreError, match=words):
            lcpatch.load_cache(changed, model)
    assert not (tmp_path / "three").exists()
