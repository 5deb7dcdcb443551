"""Applying a patch, and taking it off without a trace."""

import copy
import io
import json
import time
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fingerprint import fingerprint, registries
from models import FAMILIES, HYBRID, SHORT, attention_layers, attention_outputs, build, config_for, tokens
from noise import distance, model_budget
from torch import nn

import lcpatch
from lcpatch import S2, SF, PatchConfig, Shift, Sink
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


# Layers


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_unpatched_layers_are_bit_equal(attn: str, training: bool):
    """Each layer that stays dense gets, from the same input, the same output to the bit: padded, chunked, decoded."""
    model, ids = build(attn=attn, num_hidden_layers=4).train(training), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0  # on the left
    outputs = {}
    for patched in (False, True):
        if patched:
            lcpatch.apply(model, "s2", layers=[3], **S2_SHORT)  # all that comes before the first sparse layer
        with torch.no_grad():
            outputs[patched] = attention_outputs(model, lambda: _forwards(model, ids, mask))
    dense_calls = [n for n in range(len(outputs[False])) if n % 4 != 3]
    assert all(torch.equal(outputs[False][n], outputs[True][n]) for n in dense_calls)


def _forwards(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
    model(ids)
    model(ids, attention_mask=mask, use_cache=False)
    cache = model(ids[:, :40], attention_mask=mask[:, :40]).past_key_values
    model(ids[:, 40:70], attention_mask=mask[:, :70], past_key_values=cache)
    model(ids[:, 70:71], attention_mask=mask[:, :71], past_key_values=cache)
    model(ids[:, :30], past_key_values=transformers.StaticCache(config=model.config, max_cache_len=64))


@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_models_are_patched_on_full_attention_layers_only(family: str):
    model, ids = build(family), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    outputs = {}
    model = build(family, layer_types=kinds)
    for patched in (False, True):
        if patched:
            lcpatch.apply(model, "s2", **S2_SHORT)
        with torch.no_grad():
            outputs[patched] = attention_outputs(model, lambda: _forwards(model, ids, mask))
    for n, (a, b) in enumerate(zip(outputs[False], outputs[True], strict=True)):
        assert torch.equal(a, b) == (n % 3 < 2), n
    rows = lcpatch.report(model)
    assert [row.kind for row in rows] == kinds
    assert [row.method for row in rows] == [None, None, "s2"]
    assert rows[0].why == "attends within a window of its own"
    assert model.config.lcpatch["layers"] == [2]
    with pytest.raises(ValueError, match=r"layer 0 attends within a window; full-attention layers: \[2\]"):
        lcpatch.apply(model, "s2", layers=[0])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        ([3, 1, 1], [1, 3]),
        (range(2), [0, 1]),
        ((n for n in (2, 0)), [0, 2]),
        (np.array([1, 4]), [1, 4]),
        ("every_1", [0, 1, 2, 3, 4]),
        ("every_2", [0, 2, 4]),
        ("every_3", [0, 3]),
        (lambda n: n >= 3, [3, 4]),
    ],
)
def test_layers(layers: Any, chosen: list[int]):
    model = lcpatch.apply(build(num_hidden_layers=5), "sink", layers=layers, **SHORT["sink"])
    assert model.config.lcpatch["layers"] == chosen
    json.dumps(model.config.lcpatch)
    assert [row.index for row in lcpatch.report(model) if row.method] == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([5], "there is no layer 5; this model has layers 0 to 4"),
        ([-1], "there is no layer -1"),
        ([], "selects none of the full-attention layers"),
        (3, "layers=3 must be a list of layer indices"),
        ([0.5], r"layers=\[0.5\] must be a list of layer indices"),
        ("every_0", "must be 'every_N' with N >= 1"),
        ("every", "must be 'every_N' with N >= 1"),
        ("odd", "must be 'every_N' with N >= 1"),
        (lambda n: False, "selects none"),
    ],
)
def test_wrong_layers(layers: Any, message: str):
    with pytest.raises(ValueError, match=message):
        lcpatch.apply(build(num_hidden_layers=5), "sink", layers=layers)


def test_the_rotation_counts_sparse_layers():
    """Layers 0, 2, 4 are ranks 0, 1, 2."""
    model, ids = lcpatch.apply(build(num_hidden_layers=5), "s2", layers="every_2", **S2_SHORT), tokens()
    residues = [
        [rule.residue for rule in layer._lcpatch.spec.rules] for layer in attention_layers(model) if layer._lcpatch.spec
    ]
    assert residues == [[0, 2, 1]] * 3  # 3 KV heads, stride 3
    lcpatch.apply(model, S2(16, 1, 5, 0), layers="every_2")
    residues = [
        [rule.residue for rule in layer._lcpatch.spec.rules] for layer in attention_layers(model) if layer._lcpatch.spec
    ]
    assert residues == [[(-n) % 5 for n in range(3 * s, 3 * s + 3)] for s in range(3)]
    model(ids)


# Ways to say the same


def test_ways_to_name_a_patch(tmp_path):
    ids = tokens()
    data = {"method": "s2", "options": S2_SHORT, "layers": [1], "sinks": "tokens:2"}
    (tmp_path / "patch.json").write_text(json.dumps(data))
    (tmp_path / "patch.yaml").write_text(
        "method: s2\noptions: {block_size: 16, local_blocks: 1, stride: 3, sink_blocks: 0}\n"
        "layers: [1]\nsinks: tokens:2\n"
    )
    ways = [
        lambda m: lcpatch.apply(m, "s2", layers=[1], sinks="tokens:2", **S2_SHORT),
        lambda m: lcpatch.apply(m, S2(16, 1, 3, 0), layers=[1], sinks="tokens:2"),
        lambda m: lcpatch.apply(m, data),
        lambda m: lcpatch.apply(m, PatchConfig.from_dict(data)),
        lambda m: lcpatch.apply(m, tmp_path / "patch.json"),
        lambda m: lcpatch.apply(m, str(tmp_path / "patch.yaml")),
        lambda m: lcpatch.apply(m, {**data, "layers": [0]}, layers=[1]),
        lambda m: lcpatch.apply(m, {**data, "options": {**S2_SHORT, "stride": 9}}, stride=3),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched = [way(build()) for way in ways]
    assert len({json.dumps(m.config.lcpatch) for m in patched}) == 1
    want = patched[0](ids).logits
    assert all(torch.equal(m(ids).logits, want) for m in patched)


@pytest.mark.parametrize(
    ("method", "settings", "error", "message"),
    [
        ("s2_attn", {}, lcpatch.UnknownNameError, "ambiguous: .* is 'shift'"),
        ("longlora", {}, lcpatch.UnknownNameError, "ambiguous: .* is 'shift'"),
        ("sinks", {}, lcpatch.UnknownNameError, "Did you mean 'sink'"),
        ("s2", {"strides": 3}, ValueError, "s2 has no option 'strides'; options: block_size"),
        (S2(), {"stride": 3}, ValueError, r"options \['stride'\] belong into the pattern itself: S2\("),
        (S2, {}, ValueError, "is not a method name, a pattern, a dict"),
        (None, {}, ValueError, "is not a method name, a pattern, a dict"),
        ("s2", {"mode": "eval"}, ValueError, "mode='eval' is not one of 'train', 'always', 'never'"),
        ("s2", {"num_dense_heads": 4}, ValueError, "num_dense_heads=4, but the layer has 3 kv_heads"),
        ("s2", {"impl": "cuda"}, ValueError, "impl='cuda' is not one of 'auto', 'triton'"),
        ("shift", {"wrap": True, "sinks": "tokens", "group_size": 8, "mode": "train"}, ValueError, "rolled groups"),
        ({"method": "s2", "dense": "nonsense"}, {}, ValueError, "dense='nonsense' is not one of .*eager.*sdpa"),
    ],
)
def test_wrong_requests(method: Any, settings: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        lcpatch.apply(build(), method, **settings)


# Models that cannot take a pattern


def tiny(kind: str, config: str, **settings: Any) -> nn.Module:
    return getattr(transformers, kind)(getattr(transformers, config)(vocab_size=61, **settings))


UNSUPPORTED = {
    "t5": lambda: tiny(
        "T5ForConditionalGeneration", "T5Config", d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2
    ),
    "t5 encoder": lambda: tiny("T5EncoderModel", "T5Config", d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2),
    "bert": lambda: tiny(
        "BertModel", "BertConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ),
    "bloom": lambda: tiny("BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=1, n_head=2),
    "gptj": lambda: tiny("GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    "mistral": lambda: build("mistral", sliding_window=20),
    "deepseek_v3": lambda: tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "Linear": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models(kind: str):
    with pytest.raises(lcpatch.UnsupportedModelError) as error:
        lcpatch.apply(UNSUPPORTED[kind](), "sink")
    assert kind.split()[0] in str(error.value)  # names the model's type …
    assert "full-attention" in str(error.value) or "llama" in str(error.value)  # … and what would work
    assert isinstance(error.value, ValueError)


def test_attention_dropout_is_refused():
    model = build(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"layer 0 has attention dropout 0\.1.*attention_dropout = 0\.0"):
        lcpatch.apply(model, "s2")
    lcpatch.apply(model := build(), "s2", **S2_SHORT).train()
    for layer in attention_layers(model):
        layer.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"layer 0 \(s2\): attention dropout 0\.1 is not supported"):
        model(tokens())


def test_what_a_pattern_cannot_do_is_refused():
    model, ids = lcpatch.apply(build(), "s2", **S2_SHORT), tokens()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"layer 0 \(s2\): a Tensor mask of shape .* pass a 2-D attention_mask"):
        model(ids, attention_mask=mask)
    holes = torch.ones_like(ids)
    holes[0, 20:22] = 0
    with pytest.raises(ValueError, match="row 0 of attention_mask has padding between real tokens"):
        model(ids, attention_mask=holes)
    with pytest.warns(UserWarning, match="no weights are returned"):
        assert model(ids, output_attentions=True).logits is not None


# Sinks as an option


@pytest.mark.parametrize("method", METHODS)
def test_sink_tokens_compose_with_every_method(method: str):
    """The pairs that the method keeps, and those with the first n tokens."""
    ids = tokens()
    settings = {"mode": "always", **SHORT.get(method, {})}
    model = lcpatch.apply(build(), method, sinks="tokens:5", **settings)
    for layer in attention_layers(model):
        assert all(rule.sinks >= 5 for rule in layer._lcpatch.spec.rules)
    assert not torch.equal(model(ids).logits, lcpatch.apply(build(), method, **settings)(ids).logits)


def test_sink_tokens_are_those_of_the_sink_method():
    ids = tokens()
    window = lcpatch.apply(build(), Sink(num_sinks=0, window=9), sinks="tokens:3")(ids).logits
    assert torch.equal(window, lcpatch.apply(build(), Sink(num_sinks=3, window=9))(ids).logits)
    groups = lcpatch.apply(build(), Shift(group_size=22), mode="always", sinks="tokens")(ids).logits
    sf = SF(group_size=22, returned_fraction=0.0, num_sinks=4)
    assert torch.equal(groups, lcpatch.apply(build(), sf, mode="always")(ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_sink_logit_is_the_identity_at_start(method: str):
    model, ids = build(initializer_range=0.15), tokens(2)  # scores of ordinary size; a start of -15 is far below them
    allowed = model_budget(model, ids)
    settings = {"mode": "always", **SHORT.get(method, {})}
    want = lcpatch.apply(model, method, **settings)(ids).logits
    lcpatch.apply(model, method, sinks="logit", **settings)
    names = [n for n, _ in model.named_parameters() if n.endswith(SINK_LOGIT)]
    assert len(names) == 2
    assert distance(model(ids).logits, want) <= allowed
    for layer in attention_layers(model):
        nn.init.constant_(getattr(layer, SINK_LOGIT), 1.0)
    assert distance(model(ids).logits, want) > 100 * allowed
    lcpatch.remove(model)
    assert not [n for n, _ in model.named_parameters() if n.endswith(SINK_LOGIT)]


def test_sink_logit_stays_where_the_patch_is_dense():
    """It is part of the trained model, so evaluation and training see it alike."""
    model, ids = build(), tokens(2)
    allowed = model_budget(model, ids)
    lcpatch.apply(model, "shift", sinks="logit:0.5", group_size=4096)  # one group: sparse and dense are the same
    evaluated = model.eval()(ids).logits
    assert distance(model.train()(ids).logits, evaluated) <= allowed
    assert distance(build()(ids).logits, evaluated) > 100 * allowed


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_sink_logit_is_one_more_column_of_the_softmax(impl: str):
    """Value and every gradient in float64, against a softmax with an extra column of value zero."""
    from lcpatch.hf.sinks import add_sink_logit
    from lcpatch.patterns import LayerShape
    from lcpatch_kernels import block_sparse

    shape = LayerShape(4, 2)
    spec = S2(**S2_SHORT).spec(shape)
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, 40, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    logit = torch.randn(4, dtype=torch.float64, requires_grad=True)
    q, k, v = leaves
    got = add_sink_logit(*block_sparse(q, k, v, spec, impl=impl), logit[:, None])
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    i, j = torch.arange(40)[:, None], torch.arange(40)
    for h in range(4):
        c = (-(h // 2)) % 3
        keep = (j <= i) & ((i // 16 == j // 16) | (j // 16 % 3 == c))
        scores = scores.masked_fill(~keep & (torch.arange(4) == h)[:, None, None], -torch.inf)
    column = logit[:, None, None].expand(2, 4, 40, 1)
    want = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    grad = torch.randn_like(want)
    results = [(x, *torch.autograd.grad(x, [*leaves, logit], grad)) for x in (got, want)]
    eps = torch.finfo(torch.float64).eps
    for a, b in zip(*results, strict=True):
        assert distance(a, b) <= 40 * 8 * eps * float(b.detach().abs().max())


def test_a_model_with_sink_logits_of_its_own_gets_no_second_ones():
    with pytest.raises(lcpatch.UnsupportedModelError, match="gpt_oss has learnable sink logits of its own"):
        lcpatch.apply(build("gpt_oss"), "s2", sinks="logit")


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
