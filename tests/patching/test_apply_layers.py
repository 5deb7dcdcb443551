"""Which layers a patch reaches, the ways to name one, and what is refused."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import HYBRID, SHORT, attention_layers, attention_outputs, build, tokens
from torch import nn

import lcpatch
from lcpatch import S2, PatchConfig

S2_SHORT = SHORT["s2"]


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
