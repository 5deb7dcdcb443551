"""A cache's route on an unpatched model: bit-equal for everything else, and off again without a trace."""

import copy

import pytest
import torch
from fingerprint import fingerprint, registries
from models import FAMILIES, SHORT, build, config_for, tokens
from schedules import GROWING, WHOLE, documents
from transformers import T5Config, T5ForConditionalGeneration

import lcpatch
from lcpatch.hf import NAME
from lcpatch.hf.route import is_routed, route


def run_all(model) -> list[torch.Tensor]:
    docs = documents()
    with torch.no_grad():
        return [logits for schedule in (*WHOLE, *GROWING) for logits in schedule(model, docs)]


@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", None)])
def test_a_routed_model_is_bit_equal_on_every_schedule(family: str, attn: str | None):
    model = build(family, attn)
    want = run_all(model)
    route(model)
    assert model.config._attn_implementation == NAME
    got = run_all(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_everything(family: str):
    model, ids = build(family), tokens(2)
    config, logits, before = model.config, model(ids).logits, fingerprint(model)
    attention, masks = registries()
    route(model)
    route(model)
    assert fingerprint(model) != before
    assert torch.equal(model(ids).logits, logits)
    lcpatch.remove(model)
    assert model.config is config
    assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, logits)
    for after, earlier in zip(registries(), (attention, masks), strict=True):
        assert {k: v for k, v in after.items() if k != NAME} == {k: v for k, v in earlier.items() if k != NAME}


def test_a_patch_over_a_route_and_both_off_again():
    model, ids = build(attn="eager"), tokens(2)
    before = fingerprint(model)
    want = lcpatch.apply(build(attn="eager"), "sink", **SHORT["sink"])(ids).logits
    route(model)
    lcpatch.apply(model, "sink", **SHORT["sink"])
    assert model.config.lcpatch["dense"] == "eager"
    assert torch.equal(model(ids).logits, want)
    lcpatch.remove(model)
    assert fingerprint(model) == before


def test_patched_restores_the_route():
    model, ids = build(), tokens(2)
    route(model)
    want = model(ids).logits
    with lcpatch.patched(model, "sink", **SHORT["sink"]):
        assert not torch.equal(model(ids).logits, want)
    assert is_routed(model)
    assert torch.equal(model(ids).logits, want)


def test_gradients_are_bit_equal():
    model, ids = build().train(), tokens(2)
    model(ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    route(model)
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), want, strict=True))


def test_models_of_one_config_do_not_infect_each_other_and_copies_stay_routed():
    config = config_for("llama", attn_implementation="eager")
    one, two = build(config=config), build(config=config)
    ids, mask = tokens(2), torch.ones(2, 75, dtype=torch.long)
    mask[0, :9] = 0
    want = one(ids, attention_mask=mask).logits
    route(one)
    assert two.config is config
    assert config._attn_implementation == "eager"
    twin = copy.deepcopy(one)
    lcpatch.remove(one)
    assert is_routed(twin)
    assert torch.equal(twin(ids, attention_mask=mask).logits, want)


def test_the_users_config_changes_survive():
    model = build()
    route(model)
    model.config.use_cache = False
    lcpatch.remove(model)
    assert model.config.use_cache is False
    assert not [k for k in model.config.__dict__ if "lcpatch" in k]


def test_the_report_says_that_nothing_is_patched():
    model = build()
    route(model)
    assert {row.method for row in lcpatch.report(model)} == {None}
    assert {row.runs for row in lcpatch.report(model)} == {"sdpa"}
    with pytest.raises(ValueError, match="not patched"):
        lcpatch.save_pretrained(model, "unused")


def test_an_encoder_decoder_is_refused_and_left_alone():
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    model = T5ForConditionalGeneration(T5Config(**small))
    before = fingerprint(model)
    with pytest.raises(lcpatch.UnsupportedModelError, match="encoder-decoder"):
        route(model)
    assert fingerprint(model) == before
