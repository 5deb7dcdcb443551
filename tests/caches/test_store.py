"""Caches on disk: continuing a loaded one is continuing the saved one to the bit; what does not fit is refused."""

import copy
import json
import os
import threading

import numpy as np
import pytest
import torch
from cache_cases import ALL, feed, left_padding, make, make_model
from models import build, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, Lfm2ForCausalLM

import lcpatch
from lcpatch.caches import store
from lcpatch.caches.store import KEY

LENGTH = 110
PADS = [0, 37]
CODEC = {"codec": "int8"}
LOSSY = {"offload": True, **CODEC}
DENSE = {"dense_layers": 1}


def saved(name, tmp_path, small=True, model=None, **options):
    """A file, the cache that it holds, its model, and what comes next."""
    model = make_model(name) if model is None else model
    ids, mask = tokens(2, LENGTH), left_padding(PADS, LENGTH)
    cache = make(name, model, small, **options)
    feed(model, ids[:, :80], cache, [60, 1, 1, 18], mask[:, :80])
    return cache.save(tmp_path / "prefix.safetensors"), cache, model, (ids, mask)


def continued(model, cache, ids, mask):
    """The logits of chunks and tokens after the first 80."""
    positions, logits = (mask.cumsum(-1) - 1).clamp(min=0), []
    with torch.no_grad():
        for start, end in [(80, 81), (81, 82), (82, 100), *[(n, n + 1) for n in range(100, LENGTH)]]:
            now = slice(start, end)
            padding = {"attention_mask": mask[:, :end], "position_ids": positions[:, now]}
            logits.append(model(ids[:, now], past_key_values=cache, **padding).logits)
    return torch.cat(logits, 1)


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


# Broken files.


def test_files_that_are_no_caches(tmp_path):
    model = make_model("h2o")
    path, *_ = saved("h2o", tmp_path)
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    cases = {
        "cut": "cut off",
        "text": "not a safetensors",
        "empty": "not a safetensors",
        "other": "no cache of lcpatch",
    }
    for name, word in {**cases, "missing": "no such file"}.items():
        with pytest.raises(lcpatch.StoreError, match=word):
            lcpatch.load_cache(tmp_path / name, model)


def rewritten(path, change, tensors=None):
    """The file with its header, and perhaps its tensors, changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
    header = change(header)
    held = load_file(path) if tensors is None else tensors(load_file(path))
    save_file(
        held, path.with_name("changed"), metadata={KEY: header if isinstance(header, str) else json.dumps(header)}
    )
    return path.with_name("changed")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: h | {"format": 2}, "format 2; this lcpatch reads up to 1"),
        (lambda h: h | {"format": True}, "not one that"),
        (lambda h: h | {"cache": "cluster9"}, "unknown cache"),
        (lambda h: h | {"options": {"budget": -3}}, "budget=-3"),
        (lambda h: h | {"options": {"path": "/etc/passwd"}}, "unexpected keyword"),
        (lambda h: h | {"options": {"budget": [1]}}, "budget="),
        (lambda h: h | {"layers": h["layers"][:1]}, "holds 1 layers"),
        (lambda h: "[" * 100000, "not valid JSON"),
        (lambda h: " " * (9 << 20) + "{}", "larger than"),
        (lambda h: [], "not one that"),
    ],
)
def test_a_changed_header_is_refused(change, word, tmp_path):
    path, _, model, _ = saved("h2o", tmp_path)
    with pytest.raises(ValueError, match=word):
        lcpatch.load_cache(rewritten(path, change), model)


def scalar(x):
    return x.flatten()[0]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in ALL), ("retrieval", LOSSY), ("retrieval", DENSE), ("tiered", CODEC)]
)
def test_fuzzed_numbers_and_tensors_never_load_into_nonsense(name, options, tmp_path):
    """Every number of a layer replaced by something wrong, every tensor by one that does not fit."""
    path, _, model, _ = saved(name, tmp_path, **options)
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()[KEY])["layers"][0]["numbers"]
    for key, value in numbers.items():
        for wrong in (None, -1, "5", 1 << 60, [], [1], {}, 2.5, [-1] * len(PADS), [None] * len(PADS)):

            def change(header, key=key, wrong=wrong):
                header["layers"][0]["numbers"][key] = wrong
                return header

            if wrong == value:
                continue
            with pytest.raises(lcpatch.StoreError, match="layer 0"):
                lcpatch.load_cache(rewritten(path, change), model)
    names = [n for n in load_file(path) if n.startswith("0.")]
    for target in names:
        for wrong in (
            lambda x: x[:1],
            lambda x: x[:, :1],
            lambda x: x[..., :-1],
            lambda x: x.double(),
            lambda x: x[0],
            scalar,
        ):

            def spoil(held, target=target, wrong=wrong):
                return held | {target: wrong(held[target]).clone().contiguous()}

            with pytest.raises(lcpatch.StoreError, match="layer 0"):
                lcpatch.load_cache(rewritten(path, lambda h: h, spoil), model)

        def drop(held, target=target):
            return {k: v for k, v in held.items() if k != target}

        with pytest.raises(lcpatch.StoreError, match="layer 0"):
            lcpatch.load_cache(rewritten(path, lambda h: h, drop), model)
    extra = rewritten(path, lambda h: h, lambda held: held | {"9.keys": torch.zeros(1)})
    with pytest.raises(lcpatch.StoreError, match=r"unknown tensor '9.keys'"):
        lcpatch.load_cache(extra, model)


def test_layers_that_have_seen_different_numbers_of_tokens_are_refused(tmp_path):
    path, _, model, _ = saved("h2o", tmp_path)

    def more(header):
        header["layers"][0]["numbers"]["seen"] += 1
        return header

    with pytest.raises(lcpatch.StoreError, match=r"have seen different numbers of tokens: \[80, 81\]"):
        lcpatch.load_cache(rewritten(path, more), model)


# Writing.


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path, cache, *_ = saved("h2o", tmp_path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(lcpatch.StoreError, match=r"what was there is untouched.*No space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.safetensors"]


def test_a_file_can_be_read_by_whom_any_new_file_can(tmp_path):
    before = os.umask(0o027)
    try:
        path, *_ = saved("h2o", tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_writers_and_readers_of_one_file_never_see_half_of_one(tmp_path):
    path, cache, model, _ = saved("h2o", tmp_path)
    other = make("h2o", model)
    feed(model, tokens(1, 50), other, [50])
    failed, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                assert lcpatch.load_cache(path, model).get_seq_length() in (50, 80)
            except Exception as error:
                failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=lambda c=c: [c.save(path) for _ in range(8)]) for c in (cache, other)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failed
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.safetensors"]


@pytest.mark.parametrize("smaller", [False, True])
def test_a_file_that_is_replaced_while_it_is_opened_is_opened_anew(smaller, tmp_path, monkeypatch):
    """safetensors opens it twice: for its header, and for the data, which must not be another file's."""
    path, _, model, _ = saved("h2o", tmp_path)
    other, opened = make("h2o", model), []
    feed(model, tokens(1, 50), other, [50])

    def replaced(*args, **kwargs):
        opened.append(safe_open(*args, **kwargs))
        if len(opened) == 1:
            other.save(path)
            if smaller:  # what torch then says
                raise RuntimeError("size <40640> is smaller than the required mapping size <42256>")
        return opened[-1]

    monkeypatch.setattr(store, "safe_open", replaced)
    assert lcpatch.load_cache(path, model).get_seq_length() == 50
    assert len(opened) == 2


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
    assert store.read_header(path)["options"].keys().isdisjoint({"disk", "host_bytes"})
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
        header = store.read_header(path)
        header["options"] |= options
        save_file(load_file(path), tmp_path / "changed", metadata={KEY: json.dumps(header)})
        with pytest.raises(lcpatch.StoreError, match=words):
            lcpatch.load_cache(tmp_path / "changed", model)
    assert not (tmp_path / "three").exists()
