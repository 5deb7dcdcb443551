"""Applying a patch, and taking it off without a trace."""

import copy
import io
import time
import tracemalloc
import warnings

import pytest
import torch
from fingerprint import fingerprint, registries
from models import FAMILIES, SHORT, attention_layers, build, config_for, tokens
from torch import nn

import lcpatch
from lcpatch import Sink
from lcpatch.hf import NAME
from lcpatch.hf.state import SINK_LOGIT

METHODS = tuple(lcpatch.methods())
S2_SHORT = SHORT["s2"]


# Undo


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sinks", [None, "logit"])
def test_remove_restores_everything(family: str, sinks: str | None):
    if family == "gpt_oss" and sinks:
        pytest.skip("has sink logits of its own")
    model, ids = build(family), tokens(2)
    config, logits, before = model.config, model(ids).logits, fingerprint(model)
    attention, masks = registries()
    for method in METHODS:
        lcpatch.apply(model, method, mode="always", sinks=sinks, **SHORT.get(method, {}))
        assert not torch.equal(model(ids).logits, logits)
        assert fingerprint(model) != before
    model.generate(ids[:, :5], max_new_tokens=2)
    lcpatch.remove(model)
    assert model.config is config
    assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, logits)
    attention_after, masks_after = registries()
    for after, earlier in ((attention_after, attention), (masks_after, masks)):
        assert {k: v for k, v in after.items() if k != NAME} == {k: v for k, v in earlier.items() if k != NAME}


def test_remove_without_a_patch_does_nothing():
    model = build()
    before = fingerprint(model)
    assert lcpatch.remove(model) is model
    assert fingerprint(model) == before


def test_the_users_config_changes_survive_remove():
    model = lcpatch.apply(build(), "s2", **S2_SHORT)
    model.config.use_cache = False
    model.config.my_own = "kept"
    model.config.rope_parameters["rope_theta"] = 123.0  # in place
    del model.config.pad_token_id
    lcpatch.remove(model)
    assert model.config.use_cache is False
    assert model.config.my_own == "kept"
    assert model.config.rope_parameters["rope_theta"] == 123.0
    assert "pad_token_id" not in model.config.__dict__
    assert not hasattr(model.config, "lcpatch")
    assert model.config._attn_implementation == "sdpa"


def test_a_failed_apply_changes_nothing():
    model = lcpatch.apply(build(), "sink", **SHORT["sink"])
    before = fingerprint(model)
    for wrong in (
        {"stride": 0},
        {"layers": [9]},
        {"num_dense_heads": 7},
        {"sinks": "no"},
        {"mode": "no"},
        {"impl": "cuda"},
    ):
        with pytest.raises(ValueError, match=r"must be|no layer|has 3 kv_heads|is not one of"):
            lcpatch.apply(model, "s2", **wrong)
    assert fingerprint(model) == before


# Twice, nested, copied, shared


def test_applying_twice_replaces():
    model, ids = build(), tokens()
    want = lcpatch.apply(build(), "sink", **SHORT["sink"])(ids).logits
    lcpatch.apply(model, "s2", sinks="logit", **S2_SHORT)
    lcpatch.apply(model, "sink", **SHORT["sink"])
    assert torch.equal(model(ids).logits, want)
    assert model.config.lcpatch["method"] == "sink"
    assert not [n for n, _ in model.named_parameters() if SINK_LOGIT in n]


def test_applying_twice_keeps_the_first_dense_implementation():
    """The one of the unpatched model, not our own name."""
    model = build(attn="eager")
    for _ in range(2):
        lcpatch.apply(model, "shift")
        assert model.config.lcpatch["dense"] == "eager"
    assert lcpatch.remove(model).config._attn_implementation == "eager"


def test_patched_restores_an_unpatched_model():
    model, ids = build(), tokens()
    before, logits = fingerprint(model), model(ids).logits
    with lcpatch.patched(model, "sf", mode="always", **SHORT["sf"]) as same:
        assert same is model
        assert not torch.equal(model(ids).logits, logits)
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="mine"), lcpatch.patched(model, "sf"):
        raise RuntimeError("mine")
    assert fingerprint(model) == before


def test_patched_restores_an_earlier_patch():
    """Its trained sink logits and its implementation with it."""
    model, ids = lcpatch.apply(build(), "s2", sinks="logit:-1", impl="sdpa", layers=[1], **S2_SHORT), tokens()
    logit = getattr(attention_layers(model)[1], SINK_LOGIT)
    nn.init.normal_(logit)
    before, logits = dict(model.config.lcpatch), model(ids).logits
    with lcpatch.patched(model, "sink", **SHORT["sink"]):
        assert not torch.equal(model(ids).logits, logits)
    assert model.config.lcpatch == before
    assert getattr(attention_layers(model)[1], SINK_LOGIT) is logit  # an optimizer may hold it
    assert lcpatch.report(model)[1].runs == "block_sparse/sdpa"
    assert torch.equal(model(ids).logits, logits)


def test_models_of_one_config_do_not_infect_each_other():
    config = config_for("llama")
    one, two = build(config=config), build(config=config)
    assert one.config is two.config
    ids = tokens()
    logits = two(ids).logits
    lcpatch.apply(one, "s2", **S2_SHORT)
    assert two.config is config
    assert not hasattr(config, "lcpatch")
    assert config._attn_implementation == "sdpa"
    assert torch.equal(two(ids).logits, logits)
    lcpatch.apply(two, "sink", **SHORT["sink"])
    assert one.config.lcpatch["method"] == "s2"
    lcpatch.remove(one)
    assert two.config.lcpatch["method"] == "sink"
    assert not torch.equal(two(ids).logits, logits)
    assert torch.equal(one(ids).logits, logits)
    assert lcpatch.remove(two).config is config


def test_a_model_made_from_a_patched_models_config():
    """Follows the patch that the config carries, as one that transformers loads does, until it is patched itself."""
    ids = tokens()
    patched = lcpatch.apply(build(), "s2", **S2_SHORT)
    other = build(config=patched.config)
    assert torch.equal(other(ids).logits, patched(ids).logits)
    assert torch.equal(lcpatch.remove(other)(ids).logits, build()(ids).logits)
    lcpatch.apply(other, "sink", layers=[0], **SHORT["sink"])
    assert torch.equal(other(ids).logits, lcpatch.apply(build(), "sink", layers=[0], **SHORT["sink"])(ids).logits)


def test_deepcopy_of_a_patched_model():
    model, ids = lcpatch.apply(build(), "s2", sinks="logit", **S2_SHORT), tokens()
    twin = copy.deepcopy(model)
    want = model(ids).logits
    lcpatch.remove(model)
    assert torch.equal(twin(ids).logits, want)
    lcpatch.remove(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.config is not model.config
    assert twin.config.__dict__ == model.config.__dict__


def test_saving_and_loading_a_whole_patched_model():
    model, ids = lcpatch.apply(build(), "s2", sinks="logit", **S2_SHORT), tokens()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(lcpatch.remove(loaded)(ids).logits, lcpatch.remove(model)(ids).logits)


# Warnings, implementations, cost


def test_a_sequence_beyond_the_trained_positions_warns_once():
    model = lcpatch.apply(build(max_position_embeddings=48), "s2", **S2_SHORT)
    with pytest.warns(UserWarning, match="longer than the 48 positions"):
        model(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens())


def test_uncovered_blocks_warn():
    with pytest.warns(UserWarning, match=r"s2: .* far blocks are seen by no head"):
        lcpatch.apply(build(), "s2", stride=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcpatch.apply(build(), "s2", stride=6)


def test_rolled_groups_warn():
    with pytest.warns(UserWarning, match="show the first group's tokens the sequence's end"):
        lcpatch.apply(build(), "shift", wrap=True)
    with pytest.raises(ValueError, match="mode='always'"):
        lcpatch.apply(build(), "shift", wrap=True, group_size=8, mode="always")


def test_triton_without_triton_says_what_to_install(monkeypatch):
    from lcpatch_kernels.block_sparse import choose

    monkeypatch.setitem(choose.__globals__, "has_triton", lambda: False)
    with pytest.raises(ImportError, match=r"pip install .*triton"):
        lcpatch.apply(build(), "s2", impl="triton", **S2_SHORT)(tokens())
    lcpatch.apply(build(), "s2", **S2_SHORT)(tokens())  # "auto" does without


def test_triton_on_a_cpu_is_no_silent_fallback(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run here: the tensors are on cpu"):
        lcpatch.apply(build(), "s2", impl="triton", **S2_SHORT)(tokens())


def test_apply_is_quick_and_independent_of_the_length():
    model = build(num_hidden_layers=24, max_position_embeddings=1 << 20)
    start = time.perf_counter()
    lcpatch.apply(model, "s2")
    assert time.perf_counter() - start < 1.0


def test_32k_tokens_build_no_square():
    """A T x T mask of booleans would be 1 GB, and of floats 4 GB."""
    length = 32_768
    model = build(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8, hidden_size=8, attn="sdpa"
    )
    lcpatch.apply(model, Sink(window=64))
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, :100] = 0
    peak = 0

    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    peak = max(peak, x.untyped_storage().nbytes())
            return out

    tracemalloc.start()
    with torch.no_grad(), Peak():
        model.model(tokens(1, length), attention_mask=mask, use_cache=False)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < peak < length * length // 64
    assert python_peak < length * length // 64
