"""The attention function for the Hub: a model that runs through it alone gives what `lcpatch.apply` gives."""

import warnings
from typing import Any

import pytest
import torch
from budget import ULPS
from models import SHORT, build, tokens
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import lcpatch
from lcpatch_kernels import transformers_attention
from lcpatch_kernels.transformers_attention import flash_attn_forward, supports_flash_attn

NAME = "hub_kernel"
EXACT = {
    "rtol": 0,
    "atol": 1e4 * torch.finfo(torch.float64).eps,
}  # two orders of the same float64 sums, logits near 100


@pytest.fixture(autouse=True, scope="module")
def _registered():
    """As transformers does with a kernel that has these two names."""
    assert supports_flash_attn
    AttentionInterface.register(NAME, flash_attn_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    transformers_attention._say.cache_clear()


def pair(method: str | None, family: str = "llama", **settings: Any):
    """A patched model, and one with the same weights and config that knows the kernel only."""
    model = build(family)
    if method is not None:
        lcpatch.apply(model, method, **{**SHORT[method], "mode": "always", **settings})
    config = type(model.config).from_dict(model.config.to_dict())
    other = build(family, attn=NAME, config=config)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lcpatch" not in k})
    return model, other.train(model.training)


def run(model: Any, want: str = "logits", real: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """The logits of the real tokens, or the gradients, as one row of numbers."""
    output = model(**given, use_cache=False)
    if want == "logits":
        return (output.logits if real is None else output.logits[real]).detach().flatten()
    model.zero_grad()
    output.loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def assert_same(other: Any, model: Any, want: str = "logits", **given: Any) -> float:
    """`other` is no further from `model` in float64 than twice what float32 costs `model`; gives that budget."""
    like, got = run(model, want, **given), run(other, want, **given)
    exact = run(model.double(), want, **given)
    model.float()
    eps = torch.finfo(torch.float32).eps
    budget = 2 * (like - exact).abs().max() + ULPS * eps * exact.abs().max()
    assert (got - exact).abs().max() <= budget
    return float(budget)


@pytest.mark.parametrize("method", lcpatch.methods())
@pytest.mark.parametrize("sinks", [None, "tokens:5"])
def test_it_follows_the_specs(method: str, sinks: str | None):
    model, other = pair(method, sinks=sinks)
    ids = tokens(2)
    budget = assert_same(other, model, input_ids=ids)
    assert (run(other, input_ids=ids) - run(build(), input_ids=ids)).abs().max() > 100 * budget


FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen3", "gpt_oss", "smollm3", "granite", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_padding_and_generation(family: str):
    model, other = pair("s2", family)
    ids = tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    assert_same(other, model, real=mask.bool(), **given)
    settings = {**given, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(other.generate(**settings), model.generate(**settings))
    if family in ("llama", "gemma3_text"):
        static = other.generate(**settings, cache_implementation="static")
        assert torch.equal(static, model.generate(**settings))


def test_packed_rows_and_gradients():
    model, other = pair("sf")
    ids = tokens()
    positions = torch.cat([torch.arange(31), torch.arange(44)])[None]
    assert_same(other.train(), model.train(), "gradients", input_ids=ids, position_ids=positions, labels=ids)


@pytest.mark.parametrize("mode", ["train", "never"])
def test_the_mode_is_kept(mode: str):
    model, other = pair("shift", mode=mode)
    ids, dense = tokens(), build()
    budget = assert_same(other.train(), model.train(), input_ids=ids)
    apart = (run(other, input_ids=ids) - run(dense, input_ids=ids)).abs().max()
    assert apart <= budget if mode == "never" else apart > 100 * budget
    assert_same(other.eval(), dense, input_ids=ids)


@pytest.mark.parametrize("patch", [None, {"format": 1, "method": "s2"}])
def test_without_specs_it_is_causal_and_says_so_once(patch: dict | None):
    _, other = pair(None)
    if patch is not None:
        other.config.lcpatch = patch
    transformers_attention._say.cache_clear()
    with pytest.warns(UserWarning, match="carries no specs, so this is plain causal attention"):
        other(tokens())
    assert_same(other, build(), input_ids=tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(tokens())


BROKEN = [
    "",
    "x",
    "64",
    "64 1",
    "64 1 0 0 0 1 0 0 15 0",
    "63 1 0 0 0 1 0 0 15 0 0 0 0 0",
    "16 1 0 0 0 1 0 0 9",
    [1],
    "9" * 5000,
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_specs_are_refused(text: Any):
    _, other = pair("s2")
    other.config.lcpatch["specs"]["0"] = text
    with pytest.raises(ValueError, match="the spec of layer 0 is broken"):
        other(tokens())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": "logit:0.5"}, "learnable sinks"),
        ({"sinks": "prefix:2"}, "learnable sinks"),
        ({"mode": "sometimes"}, "mode='sometimes'"),
        ({"specs": ["0"]}, "the spec of layer 0 is broken"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict, message: str):
    _, other = pair("s2")
    other.config.lcpatch |= change
    with pytest.raises(ValueError, match=message):
        other(tokens())


def test_dropout_windows_and_growing_ratios_are_refused():
    _, other = pair("sink")
    layer = other.model.layers[0].self_attn
    x = torch.randn(1, 9, 7, 4)
    k = x[:, :3]
    with pytest.raises(ValueError, match="attention dropout"):
        flash_attn_forward(layer, x, k, k, None, dropout=0.1)
    with pytest.raises(ValueError, match="sliding window of its own"):
        flash_attn_forward(layer, x, k, k, None, sliding_window=4)
    _, other = pair("shift", mode="train", group_size=None, group_ratio=0.25)
    with pytest.raises(ValueError, match="must come at once"):
        flash_attn_forward(other.train().model.layers[0].self_attn, x[:, :, :1], k, k, None)
