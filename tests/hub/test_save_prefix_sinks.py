"""Prefix sinks through files: of a full model, beside an adapter, after a merge; and files that do not fit."""

from pathlib import Path

import pytest
import torch
from models import SHORT, attention_layers, build, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lcpatch
from lcpatch.hf.models import attention_modules, unwrap
from lcpatch.hf.sinks import sink_parameters, sinks_of
from lcpatch.training import lora

FILE = "lcpatch.safetensors"


def sunk(**overrides):
    model = lcpatch.apply(build(), "sf", **{**SHORT["sf"], "sinks": "prefix:2", "layers": [1], **overrides})
    for layer in attention_layers(model):
        for parameter in sinks_of(layer).values():
            nn.init.normal_(parameter)
    return model


def sinks(model: nn.Module) -> dict[str, nn.Parameter]:
    return sink_parameters(attention_modules(unwrap(model)))


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Dense and sparse, to the bit; and the model does not do without its sinks."""
    ids = tokens(2)
    assert sinks(loaded).keys() == sinks(model).keys() == {f"layers.1.sink_{x}" for x in ("logit", "key", "value")}
    assert all(torch.equal(a, b) for a, b in zip(sinks(loaded).values(), sinks(model).values(), strict=True))
    with torch.no_grad():
        for training in (True, False):
            want = model.train(training)(ids).logits
            assert torch.equal(loaded.train(training)(ids).logits, want)
        sinks(loaded)["layers.1.sink_value"].zero_()
        assert not torch.equal(loaded(ids).logits, want)


def test_a_model_comes_back(tmp_path: Path):
    model = sunk()
    held = sinks(model)
    lcpatch.save_pretrained(model, tmp_path)
    assert all(p is held[name] for name, p in sinks(model).items())  # an optimizer may hold them
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "sink" in name]
    assert_same(lcpatch.from_pretrained(tmp_path), model)


def test_an_adapter_and_its_merge_come_back(tmp_path: Path):
    model = lora.prepare(sunk())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    lcpatch.save_pretrained(model, tmp_path / "adapter")
    assert_same(lcpatch.from_pretrained(tmp_path / "adapter", base=build()), model)
    merged = lora.merge(lcpatch.from_pretrained(tmp_path / "adapter", base=build()))
    lcpatch.save_pretrained(merged, tmp_path / "merged")
    assert_same(lcpatch.from_pretrained(tmp_path / "merged"), merged)
    assert all(torch.equal(a, b) for a, b in zip(sinks(merged).values(), sinks(model).values(), strict=True))


def test_half_precision_models_keep_them_in_fp32(tmp_path: Path):
    lcpatch.save_pretrained(sunk(), tmp_path / "whole")
    half = lcpatch.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in sinks(half).values()} == {torch.float32}
    lcpatch.save_pretrained(half, tmp_path / "half")
    assert_same(lcpatch.from_pretrained(tmp_path / "half"), half)


def test_transformers_alone_refuses(tmp_path: Path):
    """What inference needs is not left out in silence, though this method is sparse in training only."""
    lcpatch.save_pretrained(sunk(), tmp_path)
    lcpatch.register()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has learnable sinks, .* use lcpatch\.from_pretrained"):
        plain(tokens())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.sink_value"), "exactly the sinks of this patch, .*layers.1.sink_value"),
        (lambda t: t.update(more=torch.zeros(1)), "exactly the sinks of this patch, .*more"),
        (lambda t: t.update({"layers.1.sink_key": torch.zeros(3, 2, 7)}), r"layers.1.sink_key .* shape \[3, 2, 16\]"),
        (lambda t: t.update({"layers.1.sink_key": torch.zeros(3, 2, 16).int()}), "layers.1.sink_key .* floating-point"),
        (lambda t: t.update({"layers.1.sink_logit": torch.zeros(9)}), r"layers.1.sink_logit .* shape \[9, 2\]"),
        (lambda t: t.update(more=torch.zeros(2**19)), r"larger than \d+ bytes"),
    ],
)
def test_files_that_do_not_fit(change, message: str, tmp_path: Path):
    lcpatch.save_pretrained(sunk(), tmp_path)
    tensors = load_file(tmp_path / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        lcpatch.from_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match=f"there is no {FILE}"):
        lcpatch.from_pretrained(tmp_path)
