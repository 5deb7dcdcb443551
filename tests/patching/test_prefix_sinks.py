"""Prefix sinks are keys and values in front of the text: against a softmax that really has them there, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chunkwise_cases import far, taken
from models import FAMILIES, SHORT, attention_layers, build, tokens
from noise import FACTOR, distance, model_budget
from schedules import (
    GROWING,
    chunked,
    documents,
    left_padded_decoded,
    packed_rows,
    pad,
    plain,
    positions_of,
    static_chunked,
)
from torch import Tensor, nn

import lcpatch
from lcpatch.hf import attention
from lcpatch.hf.sinks import NAMES, is_sink, merge_sinks, sink_scores, sinks_of
from lcpatch.hf.state import SINK_KEY, SINK_LOGIT, SINK_VALUE
from lcpatch.hf.watch import Call
from lcpatch_kernels.block_sparse import dense

METHODS = list(lcpatch.methods())
FLAT = 0.15
"""Weights so drawn give scores of ordinary size, beside which a start of -8 is low."""


def sunk(model: Any, method: str = "s2", sinks: str = "prefix:3:0.5", mode: str = "always", **settings: Any) -> Any:
    """`model` with prefix sinks that are far from their start, as if trained."""
    model = lcpatch.apply(model, method, sinks=sinks, mode=mode, **{**SHORT.get(method, {}), **settings})
    torch.manual_seed(3)
    for layer in attention_layers(model):
        for parameter in sinks_of(layer).values():
            nn.init.normal_(parameter)
    return model


def with_sinks_in_front(module: nn.Module, call: Call) -> Tensor:
    """The definition: sinks' keys and values before all others, a mask that shows them to every query, one softmax."""
    logit, key, value = (getattr(module, name).to(call.query.dtype) for name in (SINK_LOGIT, SINK_KEY, SINK_VALUE))
    (rows, heads, num, dim), n = call.query.shape, key.shape[1]

    def in_front(sink: Tensor, x: Tensor) -> Tensor:
        sink, x = (y.repeat_interleave(heads // y.shape[-3], -3) for y in (sink, x))
        return torch.cat([sink.expand(rows, *sink.shape), x], 2)

    keys, values = in_front(key, call.key), in_front(value, call.value)
    scores = call.query @ keys.mT * (dim**-0.5 if call.scale is None else call.scale)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = torch.cat([scores[..., :n] + logit[:, None], scores[..., n:]], -1)
    sees = dense.mask_mod(call.spec, call.bounds, num, call.key.shape[2], call.query.device)
    sees = sees(*torch.meshgrid(*map(torch.arange, (rows, heads, num, call.key.shape[2])), indexing="ij"))
    sees = torch.cat([torch.ones(rows, heads, num, n, dtype=torch.bool), sees], -1)
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values


@contextmanager
def by_definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers without sinks run as they do."""
    with monkeypatch.context() as m:
        own, merge = attention.attend, attention.merge_sinks
        calls: list[Call] = []
        m.setattr(attention, "attend", lambda call: (calls.append(call), own(call))[1])

        def merged(module: nn.Module, out: Tensor, lse: Tensor, scores: Tensor | None) -> Tensor:
            call = calls.pop()
            return merge(module, out, lse, None) if scores is None else with_sinks_in_front(module, call)

        m.setattr(attention, "merge_sinks", merged)
        yield


def results(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Logits of the real tokens, and the gradient of every parameter."""
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    model.zero_grad(set_to_none=True)
    (logits * weights)[mask].sum().backward()
    return {"logits": logits.detach()[mask], **taken(model)}


def rounding(model: nn.Module, results_of_it: dict[str, Tensor], **inputs: Any) -> float:
    """How far another implementation of the tokens' attention, a dense mask, moves results of this model."""
    states = [layer._lcpatch for layer in attention_layers(model)]
    before = [state.impl for state in states]
    for state in states:
        state.impl = "sdpa"
    error = far(results(model, **inputs), results_of_it)
    for state, impl in zip(states, before, strict=True):
        state.impl = impl
    assert 0 < error < 1e-6  # some families' norms sum in fp32 whatever their dtype
    return FACTOR * error


def inputs_of(schedule: str) -> dict[str, Tensor]:
    if schedule == "whole":
        return {"input_ids": tokens(2)}
    docs = documents()
    if schedule == "left padded":
        ids, mask = pad(docs, "left")
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
    ids = torch.cat(docs)[None]
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(d)) for d in docs])[None]}


CASES = [
    *(("llama", method, "always", schedule) for method in METHODS for schedule in ("whole", "left padded", "packed")),
    ("llama", "sf", "never", "left padded"),
    ("gemma2", "s2", "always", "left padded"),
    *(
        pytest.param(family, "sink", "always", "left padded", marks=pytest.mark.slow)
        for family in FAMILIES
        if family not in ("llama", "gemma2", "gpt_oss")
    ),
]


@pytest.mark.parametrize(("family", "method", "mode", "schedule"), CASES)
def test_they_are_keys_and_values_in_front(family: str, method: str, mode: str, schedule: str, monkeypatch):
    """Logits and every gradient, those of the sinks among them; a sink of one KV head that lost its value is seen."""
    layers = {"layer_types": ["full_attention"] * 3} if family == "gemma2" else {}  # eager layers compute in fp32
    model = sunk(build(family, **layers), method, mode=mode).double()
    inputs = inputs_of(schedule)
    got = results(model, **inputs)
    allowed = rounding(model, got, **inputs)
    with by_definition(monkeypatch):
        want = results(model, **inputs)
    sinks = [name for name in want if is_sink(name)]
    assert len(sinks) == 3 * len(model.config.lcpatch["layers"])
    assert far(got, want) <= allowed
    for name in sinks:
        assert (want[name] != 0).any(-1).all(), name
    nn.init.zeros_(getattr(attention_layers(model)[0], SINK_VALUE)[:1, :1])
    assert far(results(model, **inputs), want) > 1e4 * allowed


FEEDS = [
    *(("s2", schedule) for schedule in (packed_rows, chunked, left_padded_decoded, static_chunked)),
    *(pytest.param(method, f, marks=pytest.mark.slow) for method in ("sink", "sf") for f in (packed_rows, *GROWING)),
]


@pytest.mark.parametrize(("method", "schedule"), FEEDS)
def test_however_a_text_is_fed(method: str, schedule: Any):
    """Packed beside padded, in chunks, token by token, from static caches: the logits of one plain forward."""
    model, docs = build(), documents()
    allowed = model_budget(model, docs[0][None])
    sunk(model, method)
    with torch.no_grad():
        for got, doc in zip(schedule(model, docs), docs, strict=True):
            assert distance(got, plain(model, doc)) <= allowed


def test_without_keys_and_values_they_are_a_sink_logit():
    """n of them with logit s are one sink logit of s + log n."""
    model, ids = build(), tokens(2)
    allowed = model_budget(model, ids)
    lcpatch.apply(model, "sink", sinks="prefix:4:-1", **SHORT["sink"])
    for layer in attention_layers(model):
        nn.init.zeros_(getattr(layer, SINK_KEY))
    got = model(ids).logits
    lcpatch.apply(model, "sink", sinks=f"logit:{-1 + torch.tensor(4.0).log()}", **SHORT["sink"])
    assert distance(model(ids).logits, got) <= allowed


@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_the_model_is_nearly_as_it_was(method: str):
    """No row gives the sinks more than their share, n exp(start - LSE), whose score their keys move by a few tenths."""
    model, ids = build(initializer_range=FLAT), tokens(2)
    settings = {"mode": "always", **SHORT.get(method, {})}
    want = lcpatch.apply(model, method, **settings)(ids).logits
    lcpatch.apply(model, method, sinks="prefix", **settings)
    assert [n for n, _ in model.named_parameters() if is_sink(n)] != []
    assert 0 < distance(model(ids).logits, want) < 0.01 * float(want.detach().std())
    lcpatch.apply(model, method, sinks="prefix:4:-15", **settings)
    low = distance(model(ids).logits, want)
    lcpatch.apply(model, method, sinks="prefix:4:0", **settings)
    assert low < 1e-3 * distance(model(ids).logits, want)
    lcpatch.remove(model)
    assert not [n for n, _ in model.named_parameters() if is_sink(n)]
    assert torch.equal(model(ids).logits, build(initializer_range=FLAT)(ids).logits)


def test_each_sink_begins_alone_and_alike_everywhere():
    """Equal keys would get equal gradients for ever; ranks that began apart would train apart."""
    one, other = (lcpatch.apply(build(seed=n), "s2", sinks="prefix:4", **SHORT["s2"]) for n in range(2))
    for a, b in zip(attention_layers(one), attention_layers(other), strict=True):
        assert all(torch.equal(x, sinks_of(b)[name]) for name, x in sinks_of(a).items())
        assert {tuple(sinks_of(a)[name].shape) for name in NAMES} == {(9, 4), (3, 4, 16)}
        assert len(getattr(a, SINK_KEY)[0].unique(dim=0)) == 4
    assert not torch.equal(*(getattr(layer, SINK_KEY) for layer in attention_layers(one)))


def test_half_precision():
    """Scores and shares are fp32 also under autocast, so bf16 costs what it costs without sinks."""
    model, ids = build(initializer_range=FLAT), tokens(2)
    allowed = model_budget(build(initializer_range=FLAT).to(torch.bfloat16), ids)
    want = sunk(model)(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(ids).logits.float(), want) <= allowed
    half = sunk(build(initializer_range=FLAT).to(torch.bfloat16))
    assert {p.dtype for n, p in half.named_parameters() if is_sink(n)} == {torch.float32}
    assert distance(half(ids).logits.float(), want) <= allowed
    nn.init.zeros_(getattr(attention_layers(half)[0], SINK_VALUE))
    assert distance(half(ids).logits.float(), want) > allowed


def test_a_half_precision_layer_keeps_no_fp32_copy_of_its_queries():
    """For the backward pass: it would be the largest thing that a layer keeps."""
    layer = attention_layers(sunk(build()))[0]
    query, out = (torch.randn(2, 9, 50, 16).bfloat16().requires_grad_() for _ in range(2))
    lse = torch.randn(2, 9, 50, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        merge_sinks(layer, out, lse, sink_scores(layer, query, None, None))
    assert {x.dtype for x in kept if x.numel() >= query.numel()} == {torch.bfloat16}
    assert len(kept) > 3


def test_what_is_computed_again_gives_the_same_gradients():
    """Gradient checkpointing, either kind."""
    model, ids = sunk(build(), mode="train").train(), tokens(2)
    want = results(model, input_ids=ids)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = results(model, input_ids=ids)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        model.gradient_checkpointing_disable()


def test_patched_brings_them_back():
    model, ids = sunk(build()), tokens()
    before, held = model(ids).logits, [sinks_of(layer) for layer in attention_layers(model)]
    with lcpatch.patched(model, "sink", sinks="logit", **SHORT["sink"]):
        assert set(sinks_of(attention_layers(model)[0])) == {SINK_LOGIT}
    assert torch.equal(model(ids).logits, before)
    now = [sinks_of(layer) for layer in attention_layers(model)]
    assert all(a[name] is b[name] for a, b in zip(held, now, strict=True) for name in NAMES)  # an optimizer holds them


def test_models_they_do_not_fit():
    with pytest.raises(lcpatch.UnsupportedModelError, match="sink logits of its own; leave sinks='prefix:2' out"):
        lcpatch.apply(build("gpt_oss"), "sink", sinks="prefix:2")
    model = lcpatch.apply(build(), "s2", sinks="prefix:2", **SHORT["s2"])
    layer = attention_layers(model)[0]
    setattr(layer, SINK_KEY, nn.Parameter(torch.zeros(3, 2, 5)))
    with pytest.raises(ValueError, match=r"of size 5, but it has 9 query heads of size 16: .* take sinks='logit'"):
        model(tokens())


@pytest.mark.slow
def test_compiled():
    model, ids = sunk(build()), tokens(2)
    allowed = model_budget(build(), ids)
    want = model(ids, use_cache=False).logits
    assert distance(torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits, want) <= allowed
