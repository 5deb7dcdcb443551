"""What nobody reads is not run: the last layer's attention in the first pass, and in the second without a label."""

from collections import Counter

import pytest
import torch
from chunkwise_cases import assert_same, chunked, plain, rounding, rounding_of_attention
from models import SHORT, build, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lcpatch
from lcpatch.training import spaco
from lcpatch.training.buffers import DeviceStore


def some_labels(ids: Tensor) -> Tensor:
    """Of chunks of 16 tokens, the second and the last: at the text's end, and between two that have none."""
    labels = torch.full_like(ids, -100)
    labels[:, 20:30], labels[0, 70:] = ids[:, 20:30], ids[0, 70:]
    return labels


def model_of(family: str, **settings) -> nn.Module:
    return build(family, **settings).double().train()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each layer's attention took keys of each chunk, in a forward or a backward: (layer, start) -> count."""
    seen: Counter = Counter()
    read = DeviceStore.read

    def note(self, unit, now):
        seen[unit[0], now.start] += 1
        return read(self, unit, now)

    monkeypatch.setattr(DeviceStore, "read", note)
    return seen


def test_the_last_layer_attends_where_it_is_read(reads: Counter):
    model, ids = model_of("llama", num_hidden_layers=3), tokens(2)
    chunked(model, ids, some_labels(ids), 16, attention="lcpatch")
    starts, twice = (0, 16, 32, 48, 64), 2  # forward and backward
    assert {start: reads[2, start] for start in starts} == {0: 0, 16: twice, 32: 0, 48: 0, 64: twice}
    for layer in (0, 1):
        assert [reads[layer, start] for start in starts] == [1 + twice] * 4 + [twice]


@pytest.mark.parametrize("reversed_", [False, True], ids=["in order", "reversed"])
def test_the_last_layer_is_the_one_that_runs_last(reads: Counter, reversed_: bool):
    model, ids = model_of("llama", num_hidden_layers=3), tokens(2)
    if reversed_:
        model.model.layers = nn.ModuleList(reversed(model.model.layers))
    labels = some_labels(ids)
    want, allowed = plain(model, ids, labels), rounding(model)
    assert_same(chunked(model, ids, labels, 16, attention="lcpatch"), want, allowed)
    last, first = (0, 2) if reversed_ else (2, 0)
    assert reads[last, 32] == 0 < reads[first, 32]


@pytest.mark.parametrize("options", [{"attention": "lcpatch"}, {"attention": "cudnn"}, {"offload": True}], ids=str)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt_oss", {}),  # sink logits; a window in the middle
        ("gpt_oss", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
    ],
)
def test_the_gradient_is_the_same(family: str, settings: dict, options: dict):
    model, ids = model_of(family, **settings), tokens(2)
    labels = some_labels(ids)
    want, allowed = plain(model, ids, labels), rounding_of_attention(model, ids, labels)
    for size in (16, 7):
        assert_same(chunked(model, ids, labels, size, **options), want, allowed)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_checkpointing_and_an_adapter(use_reentrant: bool):
    model = build()
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double().train()
    model.enable_input_require_grads()
    ids = tokens(2)
    labels = some_labels(ids)
    want, allowed = plain(model, ids, labels), rounding(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(chunked(model, ids, labels, 16, attention="lcpatch"), want, allowed)


@pytest.mark.parametrize("sinks", [None, "logit:0.5", "prefix:3:0.5"])
def test_a_patched_model(sinks: str | None):
    """Learnable sinks of the last layer have a gradient from chunks that are read alone."""
    model, ids = lcpatch.apply(build(), "s2", sinks=sinks, **SHORT["s2"]).double().train(), tokens(2)
    labels = some_labels(ids)
    want, allowed = plain(model, ids, labels), rounding(model)
    assert_same(chunked(model, ids, labels, 16, attention="lcpatch"), want, allowed)


def test_spaco_keeps_chunks_without_a_label():
    """Also the last that is kept, which is run for the first time then."""
    model, ids = model_of("gpt_neox"), tokens(2)
    plan = spaco.Plan((True, True, True, False, False), (2.0, 3.0, 1.0, 1.0, 1.0), (1.0, 2.0, 5.0, 1.0, 1.0))
    own, ours = (
        chunked(model, ids, some_labels(ids), 16, attention=name, estimator=lambda count: plan)
        for name in ("own", "lcpatch")
    )
    assert_same(ours, own, rounding_of_attention(model, ids, ids))


def test_no_label_at_all():
    """Every parameter has a gradient, as DistributedDataParallel expects: zero."""
    model, ids = model_of("llama"), tokens(2)
    loss, grads = chunked(model, ids, torch.full_like(ids, -100), 16, attention="lcpatch", num_items_in_batch=7)
    assert loss == 0
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert not any(g.any() for g in grads.values())
