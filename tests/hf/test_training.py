"""Training under a pattern: modes, ratios, gradients with checkpointing, PEFT, autocast and packing."""

import copy

import pytest
import torch
from models import HYBRID, SHORT, TOKENS, build, tokens
from noise import FACTOR, distance, model_budget
from peft import LoraConfig, get_peft_model
from schedules import documents, flattened, left_padded, packed, packed_rows, plain, right_padded
from torch import Tensor, nn

import lcpatch

METHODS = tuple(lcpatch.methods())


def gradients(model: nn.Module, ids: Tensor, **inputs) -> dict[str, Tensor]:
    """Of the language-modelling loss, for every parameter that has one."""
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, use_cache=False, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_budget(model: nn.Module, ids: Tensor) -> float:
    """The error of an eager backward against double precision, relative to each parameter's largest gradient."""
    rough, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for m in (rough, exact):
        m.set_attn_implementation("eager")
    a, b = gradients(rough, ids), gradients(exact, ids)
    return FACTOR * max(distance(a[n], b[n]) / float(b[n].abs().max()) for n in b if b[n].any())


def assert_gradients_equal(got: dict[str, Tensor], want: dict[str, Tensor], allowed: float) -> None:
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert distance(got[name], w) <= allowed * float(w.abs().max()), name


def checkpoint(model: nn.Module, use_reentrant: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5.23
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


# Gradients against the dense oracle


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_a_dense_mask(family: str, method: str):
    """Softcaps, per-head sinks and all: the reference op against autograd through a masked softmax."""
    model, ids = build(family), tokens(2)
    allowed = gradient_budget(model, ids)
    settings = {"mode": "always", **SHORT.get(method, {})}
    want = gradients(lcpatch.apply(model, method, impl="sdpa", **settings), ids)
    got = gradients(lcpatch.apply(model, method, impl="reference", **settings), ids)
    dense = gradients(lcpatch.remove(model), ids)
    assert_gradients_equal(got, want, allowed)
    assert any(distance(dense[n], w) > 100 * allowed * float(w.abs().max()) for n, w in want.items())


@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_patched_softcaps_and_sinks_are_the_models_own(family: str):
    """A pattern that leaves nothing out gives what the unpatched model gives with eager attention, gradients too."""
    model, ids = build(family, attn="eager"), tokens(2)
    allowed, allowed_gradient = model_budget(model, ids), gradient_budget(model, ids)
    logits, grads = model(ids).logits, gradients(model, ids)
    lcpatch.apply(model, "s2", stride=1)
    assert distance(model(ids).logits, logits) <= allowed
    assert_gradients_equal(gradients(model, ids), grads, allowed_gradient)


# Checkpointing, PEFT, autocast


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(method: str, reentrant: bool):
    model, ids = lcpatch.apply(build().train(), method, **SHORT.get(method, {})), tokens(2)
    docs = {"attention_mask": torch.ones_like(ids)}
    docs["attention_mask"][1, -20:] = 0
    want = gradients(model, ids, **docs)
    checkpoint(model, reentrant)
    got = gradients(model, ids, **docs)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradient_checkpointing_of_packed_rows():
    """Which documents there are is looked up again in the recomputation."""
    model, ids = lcpatch.apply(build().train(), "sf"), tokens()
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]
    want = gradients(model, ids, position_ids=positions)
    checkpoint(model, use_reentrant=False)
    got = gradients(model, ids, position_ids=positions)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("order", ["patch, then wrap", "wrap, then patch"])
@pytest.mark.parametrize("method", METHODS)
def test_lora(method: str, order: str):
    """A LoRA-wrapped model computes, and gets the gradients of, the same model with the update merged by hand."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    settings = {"mode": "always", **SHORT.get(method, {})}
    ids = tokens(2)

    def wrapped() -> nn.Module:
        torch.manual_seed(3)
        if order.startswith("patch"):
            return get_peft_model(lcpatch.apply(build(), method, **settings), lora).eval()
        return lcpatch.apply(get_peft_model(build(), lora).eval(), method, **settings)

    model = wrapped()
    merged = wrapped().merge_and_unload()
    allowed = model_budget(lcpatch.remove(copy.deepcopy(merged)), ids)
    assert distance(model(ids).logits, merged(ids).logits) <= allowed
    assert distance(model(ids).logits, build()(ids).logits) > 1000 * allowed
    grads = gradients(model, ids)
    assert grads
    assert all("lora_" in name for name in grads)
    full = gradients(merged.requires_grad_(), ids)
    name, factor = "model.layers.0.self_attn.k_proj", lora.lora_alpha / lora.r
    b = model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight
    want = factor * b.T @ full[f"{name}.weight"]  # d loss / d A = factor * B^T dW
    got = grads[f"base_model.model.{name}.lora_A.default.weight"]
    unpatched = lcpatch.remove(copy.deepcopy(merged))
    assert distance(got, want) <= gradient_budget(unpatched, ids) * float(want.abs().max())


def test_lora_patch_and_remove_through_the_wrapper():
    model = get_peft_model(build(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    ids = tokens()
    before = model(ids).logits
    lcpatch.apply(model, "s2", **SHORT["s2"])
    assert model.config is model.get_base_model().config
    assert model.config.lcpatch["method"] == "s2"
    assert not torch.equal(model(ids).logits, before)
    lcpatch.remove(model)
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(model.config, "lcpatch")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_autocast(method: str, attn: str):
    """Under bf16 autocast the error against fp32 is of the size that the unpatched model's is."""
    model, ids = build(attn=attn), tokens(2)

    def error(run: nn.Module) -> float:
        with torch.no_grad():
            exact = run(ids).logits
            with torch.autocast("cpu", torch.bfloat16):
                return distance(run(ids).logits, exact)

    allowed = FACTOR / 2 * error(model)
    lcpatch.apply(model, method, mode="always", **SHORT.get(method, {}))
    assert 0 < error(model) <= allowed
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model, ids)
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_model(method: str):
    model, ids = build().to(torch.bfloat16), tokens(2)
    allowed = model_budget(model, ids) / 2
    lcpatch.apply(model, method, mode="always", **SHORT.get(method, {}))
    with torch.no_grad():
        rough = model(ids).logits
        assert rough.dtype == torch.bfloat16
        assert distance(rough, model.float()(ids).logits) <= allowed


# Modes


@pytest.mark.parametrize("method", METHODS)
def test_mode_follows_training(method: str):
    """ "train": sparse in training and dense, to the bit, in evaluation; "always" and "never" as they say."""
    model, ids = build(), tokens(2)
    dense = model(ids).logits
    sparse = lcpatch.apply(model, method, mode="always", **SHORT.get(method, {}))(ids).logits
    assert not torch.equal(sparse, dense)
    for mode, training, want in [
        ("train", True, sparse),
        ("train", False, dense),
        ("always", True, sparse),
        ("always", False, sparse),
        ("never", True, dense),
        ("never", False, dense),
    ]:
        lcpatch.apply(model, method, mode=mode, **SHORT.get(method, {}))
        assert torch.equal(model.train(training)(ids).logits, want), (mode, training)


@pytest.mark.parametrize("method", METHODS)
def test_default_mode(method: str):
    model = lcpatch.apply(build(), method)
    assert model.config.lcpatch["mode"] == lcpatch.methods()[method].default_mode
    assert {"shift": "train", "sf": "train", "s2": "always", "sink": "always"}.get(
        method, model.config.lcpatch["mode"]
    ) == (model.config.lcpatch["mode"])


@pytest.mark.parametrize("mode", ["train", "never"])
@pytest.mark.parametrize("schedule", [packed, flattened, left_padded, right_padded], ids=lambda f: f.__name__)
def test_dense_phases_are_dense(mode: str, schedule):
    """Padding and packing hold where the patch is not active, too."""
    model = build()
    allowed = model_budget(model, tokens())
    docs = documents()
    with torch.no_grad():
        want = [plain(model, doc) for doc in docs]
        got = schedule(lcpatch.apply(model, "sf", mode=mode), docs)
    assert all(distance(a, b) <= allowed for a, b in zip(got, want, strict=True))


# Groups that are a share of the length


@pytest.mark.parametrize("method", ["shift", "sf"])
@pytest.mark.parametrize(
    "schedule", [left_padded, right_padded, packed, flattened, packed_rows], ids=lambda f: f.__name__
)
def test_a_ratio_is_a_share_of_each_document(method: str, schedule):
    """Of its real length: not of the padded row, and not of the packed one."""
    model, docs = build(), documents()
    allowed = model_budget(model, tokens())
    lcpatch.apply(model, method, group_ratio=1 / 3).train()
    with torch.no_grad():
        got, want = schedule(model, docs), [plain(model, doc) for doc in docs]
        assert all(distance(a, b) <= allowed for a, b in zip(got, want, strict=True))
        for doc, ratio in zip(docs, want, strict=True):  # and the share is that of the definition
            lcpatch.apply(model, method, mode="always", group_size=-(-len(doc) // 3))
            assert distance(plain(model, doc), ratio) <= allowed


def test_a_ratio_needs_the_whole_sequence():
    model = lcpatch.apply(build(), "sf").train()
    cache = model(tokens(1, 20)).past_key_values
    with pytest.raises(ValueError, match=r"sf: a group_ratio .* give a fixed group_size"):
        model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"mode='always' .* fixed group_size"):
        lcpatch.apply(model, "sf", mode="always")


def test_ratio_patched_model_generates_in_eval_mode():
    """Dense, as it was without the patch."""
    ids = tokens(1, 20)
    want = build().generate(ids, max_new_tokens=5, do_sample=False)
    model = lcpatch.apply(build(), "shift")
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), want)
