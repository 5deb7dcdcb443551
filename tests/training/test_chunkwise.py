"""`chunkwise.backward` leaves the gradient of one plain backward: families, sizes, masks, packing, PEFT, patches."""

import copy

import pytest
import torch
from chunkwise_cases import assert_same, chunked, far, plain, rounding, rounding_of_attention, taken, through_a_cache
from models import FAMILIES, SHORT, TOKENS, build, tokens
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from schedules import collate, documents, pack, pad, positions_of
from torch import nn

import lcpatch
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.training import chunk_cache, chunkwise, spaco, support

SIZES = (TOKENS, 64, 48, 32, 16, 7)
LABELS = {"all", "prompt masked", "tail masked", "one label"}


def double(family: str = "llama", **settings) -> nn.Module:
    return build(family, **settings).double().train()


def lora(model: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**settings)).double().train()


def checkpointed(model: nn.Module, use_reentrant: bool = False) -> nn.Module:
    if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5.23
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


# The same gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_size(family: str):
    """Grouped heads, norms on queries and keys, windows, softcaps, sink logits, experts; ragged chunks; one chunk."""
    model, ids = double(family), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    for size in SIZES:
        assert_same(chunked(model, ids, ids, size), want, allowed)


def test_without_the_injected_gradient_it_is_another():
    """The negative control of everything here: keys that later chunks read get no gradient from there."""
    model, ids = double(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    loss, cut = chunked(model, ids, ids, 16, estimator=lambda count: spaco.seco(count, hop=0.0))
    assert loss == pytest.approx(want[0], rel=allowed)
    assert far(cut, want[1]) > 1e6 * allowed


@pytest.mark.parametrize("kind", sorted(LABELS))
def test_labels(kind: str):
    """A chunk without a label still passes on what later chunks left; after the last label nothing is run."""
    model, ids = double(), tokens(2)
    labels = ids.clone()
    if kind == "prompt masked":
        labels[:, :40] = -100
    elif kind == "tail masked":
        labels[:, 33:] = -100
    elif kind == "one label":
        labels[:] = -100
        labels[1, 50] = ids[1, 50]
    want, allowed = plain(model, ids, labels), rounding(model)
    for size in (32, 7):
        assert_same(chunked(model, ids, labels, size), want, allowed)


def test_what_follows_the_last_label_is_not_run(monkeypatch: pytest.MonkeyPatch):
    runs = []
    keep = chunkwise._Run._decode
    monkeypatch.setattr(chunkwise._Run, "_decode", lambda self, m, *where: runs.append(where) or keep(self, m, *where))
    model, ids = double(), tokens(2)
    labels = ids.clone()
    labels[:, 33:] = -100  # token 31 predicts the last label, token 32
    chunked(model, ids, labels, 16)
    assert runs == [(0, 16), (16, 32), (0, 16)]  # and what is run last in the first pass is run once


def test_num_items_in_batch_divides_and_grad_scale_multiplies():
    model, ids = double(), tokens(2)
    loss, grads = chunked(model, ids, ids, 16)
    items = 2 * (TOKENS - 1)
    for given in (3 * items, torch.tensor(3 * items)):
        other, scaled = chunked(model, ids, ids, 16, num_items_in_batch=given, grad_scale=6.0)
        assert other == pytest.approx(loss / 3)
        assert all(torch.allclose(scaled[n], 2 * g, rtol=1e-12) for n, g in grads.items())


def test_gradients_add_up():
    """Like `loss.backward()`, it adds to what is there."""
    model, ids = double(), tokens(2)
    _, grads = chunked(model, ids, ids, 16)
    chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=16)
    assert all(torch.allclose(g, 2 * grads[n], rtol=1e-12) for n, g in taken(model).items())


def test_transformers_own_loss():
    """In fp32, against the loss that a model computes itself."""
    model, ids = build().train(), tokens(2)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    want, allowed = (loss.item(), taken(model)), rounding(model)
    assert_same(chunked(model, ids, ids, 16), want, allowed)


# Rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gpt_neox"])
def test_padding(family: str, side: str):
    """The left-padded rows' first chunks hold pads only."""
    model, (ids, mask) = double(family), pad(documents(), side)
    labels = ids.masked_fill(mask == 0, -100)
    for inputs in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions_of(mask)}):
        want, allowed = plain(model, ids, labels, **inputs), rounding(model)
        assert_same(chunked(model, ids, labels, 16, **inputs), want, allowed)


@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa")])
def test_packed_documents(family: str, attn: str):
    """Borders of documents and of chunks cross; a layer with a window sees the window within its document."""
    model, (ids, positions) = double(family, attn=attn), pack(documents())
    want = plain(model, ids, ids, position_ids=positions)
    allowed = rounding_of_attention(model, ids, ids, position_ids=positions)  # eager rounds to fp32 inside
    for size in (64, 7):
        assert_same(chunked(model, ids, ids, size, position_ids=positions), want, allowed)
    assert far(chunked(model, ids, ids, 16)[1], want[1]) > 1000 * allowed


def test_packed_documents_of_a_family_that_mixes_them():
    """transformers does not tell gpt_oss's masks of documents, so the model itself is no reference: each alone is."""
    model, docs = double("gpt_oss"), documents()
    ids, positions = pack(docs)
    labels, items = ids.clone(), sum(len(doc) - 1 for doc in docs)
    labels[positions == 0] = -100  # no document predicts the next one's first token
    got = chunked(model, ids, labels, 16, position_ids=positions)
    model.zero_grad()
    losses = [plain_sum(model, doc[None]) / items for doc in docs]
    sum(losses).backward()
    want = sum(losses).item(), taken(model)
    assert_same(got, want, rounding(model))


def plain_sum(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def test_what_the_flattening_collator_gives():
    model, docs = double(), documents()
    batch = collate(docs)
    ids, positions = batch.pop("input_ids"), batch.pop("position_ids")
    want = plain(model, ids, ids, position_ids=positions)
    assert_same(
        chunked(model, ids, ids, 16, position_ids=positions, **batch),
        want,
        rounding(model),
    )


# PEFT, dropout, checkpointing


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},  # keys of one layer, no values, nothing before
        {"target_modules": ["lm_head", "v_proj"]},  # the head is trained too
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["all", "keys of a layer", "head", "saved modules"],
)
def test_lora(settings: dict):
    model, ids = lora(build(), **settings), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    assert_same(chunked(model, ids, ids, 16), want, allowed)


def test_tied_head():
    model, ids = double(tie_word_embeddings=True), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    assert_same(chunked(model, ids, ids, 16), want, allowed)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "own"), ("gpt_neox", "own"), ("gemma3_text", "own"), ("gpt_neox", "lcpatch"), ("llama", "cudnn")],
)
def test_gradient_checkpointing_inside_a_chunk(family: str, attention: str, use_reentrant: bool):
    model, ids = double(family), tokens(2)
    model.enable_input_require_grads()
    want, allowed = plain(model, ids, ids), rounding_of_attention(model, ids, ids)
    model = checkpointed(model, use_reentrant)
    before = [dict(m.__dict__) for m in model.modules()]
    assert_same(chunked(model, ids, ids, 16, attention=attention), want, allowed)
    assert [dict(m.__dict__) for m in model.modules()] == before


@pytest.mark.parametrize("checkpoint", [False, True])
def test_dropout_is_the_same_in_both_passes(checkpoint: bool, monkeypatch: pytest.MonkeyPatch):
    """The reference draws the same numbers, chunk by chunk, in one graph. Without the replay the passes differ."""
    model, ids = lora(build(attention_dropout=0.1), lora_dropout=0.2), tokens(2)
    torch.manual_seed(5)
    want = through_a_cache(model, ids, ids, 16)
    after = torch.rand(1)
    if checkpoint:
        checkpointed(model)
    equal = watch_passes(monkeypatch)
    torch.manual_seed(5)
    got = chunked(model, ids, ids, 16)
    assert torch.equal(torch.rand(1), after)  # as many numbers are gone as one forward takes
    assert all(equal)
    assert len(equal) >= 2 * 4
    assert_same(got, want, rounding(lora(build())))
    monkeypatch.setattr(support.RandomState, "restore", lambda self: None)
    equal.clear()
    chunked(model, ids, ids, 16)
    assert not all(equal)


def watch_passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes, for each layer of each chunk, whether the second pass makes the first's keys and values, to the bit."""
    equal: list[bool] = []
    update = chunk_cache.ChunkLayer.update

    def compare(self, keys, values, *args, **kwargs):
        result = update(self, keys, values, *args, **kwargs)
        if not self.now.new or self.now.backward:
            here = slice(self.now.start, self.now.end)
            kept = (x[:, :, here] for x in result)
            equal.append(all(torch.equal(a, b) for a, b in zip((keys, values), kept, strict=True)))
        return result

    monkeypatch.setattr(chunk_cache.ChunkLayer, "update", compare)
    return equal


def test_autocast():
    """Under bf16 autocast every weight gets its gradient, at the error that a plain backward has there."""
    model, ids = build().train(), tokens(2)
    _, exact = plain(model, ids, ids)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    error = far(taken(model), exact)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = chunked(model, ids, ids, 16)
    assert 0 < far(got, exact) <= 2 * error


def test_half_precision():
    """Keys' gradients are summed over 32 chunks in bf16: at most twice a plain backward's error (it is 1.1 times)."""
    model, ids = build("mistral", initializer_range=0.1).to(torch.bfloat16), tokens(1, 257)
    exact = plain(copy.deepcopy(model).float(), ids, ids)[1]
    budget = 2 * total_error(plain(model, ids, ids)[1], exact)
    assert total_error(chunked(model, ids, ids, 8, attention="lcpatch")[1], exact) <= budget
    cut = chunked(model, ids, ids, 8, attention="lcpatch", estimator=lambda count: spaco.seco(count, hop=0.0))[1]
    assert total_error(cut, exact) > budget


def total_error(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative, of all parameters' gradients as one vector."""
    got, exact = (torch.cat([g.flatten().double() for g in grads.values()]) for grads in (got, exact))
    return float((got - exact).norm() / exact.norm())


# Patched models


@pytest.mark.parametrize(
    ("family", "method", "attention"),
    [*(("llama", method, "own") for method in SHORT), ("llama", "sf", "lcpatch"), ("gpt_oss", "s2", "lcpatch")],
)
def test_patched(family: str, method: str, attention: str):
    """Whole rows, left-padded rows, packed rows: blocks, groups and sinks count from each document's first token."""
    model = lcpatch.apply(double(family), method, **SHORT[method])
    before = model.config._attn_implementation, list(model.modules())[-1].__dict__.keys()
    whole, (padded, mask), (packed, positions) = tokens(2), pad(documents(), "left"), pack(documents())
    for ids, inputs in ((whole, {}), (padded, {"attention_mask": mask}), (packed, {"position_ids": positions})):
        labels = ids.masked_fill(inputs["attention_mask"] == 0, -100) if "attention_mask" in inputs else ids
        want, allowed = plain(model, ids, labels, **inputs), rounding(model)
        assert_same(chunked(model, ids, labels, 16, attention=attention, **inputs), want, allowed)
    assert (model.config._attn_implementation, list(model.modules())[-1].__dict__.keys()) == before


@pytest.mark.parametrize("sinks", ["logit:0.5", "tokens:3", "prefix:3:0.5"])
def test_patched_with_sinks_in_some_layers(sinks: str):
    model, ids = lcpatch.apply(double(), "s2", layers=[0], sinks=sinks, **SHORT["s2"]).double(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    for attention in ("own", "lcpatch"):
        assert_same(chunked(model, ids, ids, 16, attention=attention), want, allowed)


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "lcpatch") for family in ("llama", "gemma2", "gemma3_text", "gpt_oss")), ("llama", "cudnn")],
)
def test_our_attention_in_an_unpatched_model(family: str, attention: str):
    """As on a GPU: softcaps and sink logits are computed, and nothing stays on the model."""
    model, ids = double(family), tokens(2)
    implementation, config = model.config._attn_implementation, model.config
    want, allowed = plain(model, ids, ids), rounding_of_attention(model, ids, ids)
    got = chunked(model, ids, ids, 16, attention=attention)
    assert model.config is config
    assert model.config._attn_implementation == implementation
    assert not hasattr(config, "lcpatch")
    assert_same(got, want, allowed)


# Refusals


def refused(model: nn.Module, match: str, error: type = UnsupportedModelError, **inputs):
    ids = inputs.pop("ids", tokens(2))
    with pytest.raises(error, match=match):
        chunked(model, ids, inputs.pop("labels", ids), inputs.pop("size", 16), **inputs)


def test_models_whose_gradient_would_be_another():
    refused(build().model, "with a head")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused(build(rope_parameters=rope, max_position_embeddings=50), "rotates by the length")
    assert chunked(build(rope_parameters=rope), tokens(2), tokens(2), 16)[1]  # within what it was trained for
    for name, value, reason in (
        ("layer_types", ["full_attention", "linear_attention"], "linear_attention carry a state"),
        ("num_kv_shared_layers", 1, "read other layers' keys"),
        ("is_causal", False, "not causal"),
        ("is_encoder_decoder", True, "a decoder alone"),
    ):
        other = build()
        setattr(other.config, name, value)
        refused(other, reason)
    routers = build("gpt_oss")
    routers.config.output_router_logits = True
    refused(routers, "auxiliary loss")
    virtual = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(virtual, "virtual tokens")
    refused(nn.DataParallel(build()), "DataParallel")
    ratio = lcpatch.apply(double(), "sf")
    refused(ratio, "fixed group_size", ValueError)
    assert chunked(ratio, tokens(2), tokens(2), TOKENS)[1]  # one chunk sees the whole sequence
    refused(build().requires_grad_(False), "nothing to train", ValueError)
    refused(double(attention_dropout=0.1), "attention dropout", ValueError, attention="lcpatch")


def test_a_layer_that_leaves_the_cache_out_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model = double()
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, past_key_values=None, **k: forward(*a, **k))
    refused(model, "layer 1 of 2 went through the cache 0 times")


def test_inputs():
    model, ids = double(), tokens(2)
    refused(model, "labels", ValueError, labels=ids[:, 1:])
    refused(model, "chunk_size=0", ValueError, size=0)
    refused(model, "chunk_size='16' must be a whole number", ValueError, size="16")
    refused(model, "num_items_in_batch=0, which divides the loss", ValueError, num_items_in_batch=0)
    refused(model, "input_ids", ValueError, ids=ids[0])
    refused(model, "attention_mask", ValueError, attention_mask=torch.ones(2, 3))
    refused(model, "position_ids", ValueError, position_ids=torch.arange(TOKENS))
    refused(model, "none of the tokens predicts", ValueError, labels=torch.full_like(ids, -100))
    refused(model, "token_type_ids .* per token", ValueError, token_type_ids=torch.zeros_like(ids))
    refused(model, "use_cache", ValueError, use_cache=True)
    refused(model, "attention='fast'", ValueError, attention="fast")
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]
    refused(model, "leave the mask out", ValueError, attention_mask=torch.ones_like(ids), position_ids=positions)
    assert not taken(model)


def test_a_batch_without_labels_gives_zeros_where_others_have_some():
    """With `num_items_in_batch`: what gradient accumulation and several processes pass."""
    model, ids = double(), tokens(2)
    loss, grads = chunked(model, ids, torch.full_like(ids, -100), 16, num_items_in_batch=7)
    assert loss == 0
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert not any(g.any() for g in grads.values())
