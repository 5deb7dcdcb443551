"""Saving and loading: what comes back, in this process and in a fresh one, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import SHORT, attention_layers, build, tokens
from transformers import AutoModelForCausalLM

import lcpatch
from lcpatch.core.config import FORMAT
from lcpatch.hf.state import SINK_LOGIT

ROOT = Path(__file__).parents[2]
PATCHES = {
    "s2": {**SHORT["s2"], "layers": [1]},
    "sink": {**SHORT["sink"], "sinks": "tokens:3"},
    "shift": SHORT["shift"],
    "sf": {**SHORT["sf"], "sinks": "logit:0.5"},
}


def patched(method: str = "s2", seed: int = 0, **overrides):
    model = lcpatch.apply(build(seed=seed), method, **{**PATCHES[method], **overrides})
    with torch.no_grad():
        for module in attention_layers(model):
            if hasattr(module, SINK_LOGIT):
                getattr(module, SINK_LOGIT).normal_()
    return model


def with_adapter(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()


def fresh_process(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run `code` in an interpreter that has seen no model; `sys.argv[1:]` are the arguments."""
    path = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# Round trips


@pytest.mark.parametrize("method", PATCHES)
def test_a_model_comes_back(method: str, tmp_path: Path):
    model, ids = patched(method), tokens()
    lcpatch.save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "attn_implementation")
    loaded = lcpatch.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.train()(ids).logits, model.train()(ids).logits)
    assert loaded.config.lcpatch == model.config.lcpatch
    again = tmp_path / "again"
    lcpatch.save_pretrained(loaded.eval(), again)  # saving what was loaded keeps the patch
    assert torch.equal(lcpatch.from_pretrained(again)(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("method", ["s2", "sf"])
def test_an_adapter_comes_back(method: str, tmp_path: Path):
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, ids = with_adapter(lcpatch.apply(base, method, **PATCHES[method])), tokens()
    lcpatch.save_pretrained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = lcpatch.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, peft.PeftModel)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    other = lcpatch.from_pretrained(tmp_path / "adapter", base=build())
    assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="dtype is for loading a base model"):
        lcpatch.from_pretrained(tmp_path / "adapter", base=build(), dtype=torch.float32)


def test_named_adapters_come_back(tmp_path: Path):
    build().save_pretrained(tmp_path / "base")
    base = lcpatch.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "s2", **PATCHES["s2"])
    settings = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model, ids = peft.get_peft_model(base, settings, adapter_name="novels").eval(), tokens()
    lcpatch.save_pretrained(model, tmp_path / "one")
    loaded = lcpatch.from_pretrained(tmp_path / "one")
    assert loaded.active_adapter == "novels"
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.add_adapter("letters", settings)
    lcpatch.save_pretrained(model, tmp_path / "two")
    with pytest.raises(ValueError, match="several adapters; say which is active: adapter= one of letters, novels"):
        lcpatch.from_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="no adapter 'poems'; it has: letters, novels"):
        lcpatch.from_pretrained(tmp_path / "two", adapter="poems")
    both = lcpatch.from_pretrained(tmp_path / "two", adapter="letters")
    for name in ("letters", "novels"):
        both.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(both.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapter_on_a_patched_base(tmp_path: Path):
    """The adapter's own patch holds, whatever the base was saved with."""
    lcpatch.save_pretrained(patched("sink"), tmp_path / "base")
    base = lcpatch.from_pretrained(tmp_path / "base")
    model, ids = with_adapter(lcpatch.apply(base, "s2", **PATCHES["s2"])), tokens()
    lcpatch.save_pretrained(model, tmp_path / "adapter")
    loaded = lcpatch.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.lcpatch["method"] == "s2"


def test_a_merged_model_trained_sparse_runs_anywhere(tmp_path: Path):
    model, ids = with_adapter(patched("shift")).merge_and_unload(), tokens()
    lcpatch.save_pretrained(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_a_fresh_process_gets_equal_logits(tmp_path: Path):
    model, ids = patched(sinks="logit"), tokens()
    lcpatch.save_pretrained(model, tmp_path)
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "want.pt")
    code = """
import torch, lcpatch
want = torch.load(sys.argv[1] + "/want.pt")
print(torch.equal(lcpatch.from_pretrained(sys.argv[1])(want["ids"]).logits, want["logits"]))
"""
    done = fresh_process(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_transformers_alone_refuses_or_runs_dense(tmp_path: Path):
    lcpatch.save_pretrained(patched(), tmp_path)
    torch.save({"ids": tokens(), "logits": build()(tokens()).logits.detach()}, tmp_path / "dense.pt")
    code = """
import torch
from transformers import AutoModelForCausalLM
want = torch.load(sys.argv[1] + "/dense.pt")
dense = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
print(torch.equal(dense(want["ids"]).logits, want["logits"]))
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
    done = fresh_process(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "lcpatch" in done.stderr


# transformers' own loader, with lcpatch registered


@pytest.mark.parametrize("method", ["s2", "sink"])
def test_plain_loading_applies_the_patch_again(method: str, tmp_path: Path):
    model, ids = patched(method), tokens()
    lcpatch.save_pretrained(model, tmp_path)
    lcpatch.register()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert [row.method for row in lcpatch.report(plain)] == [row.method for row in lcpatch.report(model)]
    lcpatch.save_pretrained(plain, tmp_path / "again")
    assert torch.equal(lcpatch.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)
    with lcpatch.patched(plain, "shift", **SHORT["shift"], mode="always"):
        assert not torch.equal(plain(ids).logits, model(ids).logits)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert torch.equal(lcpatch.remove(plain)(ids).logits, build()(ids).logits)
    assert not hasattr(plain.config, "lcpatch")


def test_plain_loading_serves_s2_cache(tmp_path: Path):
    model, ids = patched(), tokens()
    lcpatch.save_pretrained(model, tmp_path)
    lcpatch.register()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, past_key_values=lcpatch.S2Cache(model), **settings)
    assert torch.equal(plain.generate(ids, past_key_values=lcpatch.S2Cache(plain), **settings), want)


def test_plain_loading_cannot_bring_sink_logits(tmp_path: Path):
    lcpatch.save_pretrained(patched(sinks="logit"), tmp_path)
    lcpatch.register()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use lcpatch\.from_pretrained"):
        plain(tokens())


# What is refused


def test_only_patched_models_are_saved_and_loaded(tmp_path: Path):
    with pytest.raises(ValueError, match="not patched"):
        lcpatch.save_pretrained(build(), tmp_path)
    with pytest.raises(ValueError, match="safetensors only"):
        lcpatch.save_pretrained(patched(), tmp_path, safe_serialization=False)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries no patch"):
        lcpatch.from_pretrained(tmp_path)


PATCH = {"format": 1, "method": "s2", "options": {}, "layers": [0], "mode": "always", "dense": "sdpa"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 40000, "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("\x00", "not valid JSON"),
        (" " * 70000, "is larger than 65536 bytes"),
        ({"format": 2, "patch": PATCH}, "has format 2; this lcpatch reads up to 1"),
        ({"format": True, "patch": PATCH}, "format=True must be"),
        ({"format": 1, "patch": PATCH, "run": "x"}, "unknown key 'run'"),
        ({"format": 1, "lcpatch_version": 3, "patch": PATCH}, "lcpatch_version must be"),
        ({"format": 1}, "must be a JSON object, not NoneType"),
        ({"format": 1, "patch": {**PATCH, "format": FORMAT + 1}}, f"format {FORMAT + 1}; this lcpatch reads"),
        ({"format": 1, "patch": {**PATCH, "method": "../s2"}}, "unknown attention method"),
        ({"format": 1, "patch": {**PATCH, "other": 1}}, "unknown key 'other'"),
        ({"format": 1, "patch": {**PATCH, "mode": ["always"]}}, "must be a string"),
        ({"format": 1, "patch": {**PATCH, "layers": [True]}}, "layers="),
        ({"format": 1, "patch": {**PATCH, "layers": [99]}}, "no layer 99"),
        ({"format": 1, "patch": {**PATCH, "options": {"stride": "x"}}}, "stride"),
        ({"format": 1, "patch": {**PATCH, "dense": "org/kernel"}}, "which a file may not choose"),
    ],
)
def test_a_broken_sidecar_is_refused(text: str | dict, message: str, tmp_path: Path):
    build().save_pretrained(tmp_path)
    (tmp_path / "lcpatch_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=message):
        lcpatch.from_pretrained(tmp_path)


@pytest.mark.parametrize("flag", ["trust_remote_code", "local_files_only"])
def test_a_word_is_no_yes(flag: str, tmp_path: Path):
    """Or the text "false" would run a repository's code."""
    lcpatch.save_pretrained(lcpatch.apply(build(), "s2", **SHORT["s2"]), tmp_path)
    with pytest.raises(ValueError, match=f"^{flag}='false' must be True or False$"):
        lcpatch.from_pretrained(tmp_path, **{flag: "false"})
    assert lcpatch.from_pretrained(tmp_path, trust_remote_code=None, local_files_only=True)


def test_two_different_patches_are_refused(tmp_path: Path):
    lcpatch.save_pretrained(patched(), tmp_path)
    (tmp_path / "lcpatch_config.json").write_text(json.dumps({"format": 1, "patch": PATCH}))
    with pytest.raises(ValueError, match="carry different patches"):
        lcpatch.from_pretrained(tmp_path)
    (tmp_path / "lcpatch_config.json").unlink()  # config.json alone is enough
    assert torch.equal(lcpatch.from_pretrained(tmp_path)(tokens()).logits, patched()(tokens()).logits)


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_broken_sink_logits_are_refused(content: bytes | None, tmp_path: Path):
    lcpatch.save_pretrained(patched(sinks="logit"), tmp_path)
    file = tmp_path / "lcpatch.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"lcpatch\.safetensors"):
        lcpatch.from_pretrained(tmp_path)
