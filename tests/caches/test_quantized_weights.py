"""Every cache on models whose weights are int8: what they hold and compute is in the dtype of the keys."""

import pytest
import torch
from cache_cases import ALL, LENGTH, feed, left_padding, make, make_model
from models import build, tokens
from noise import distance, model_budget
from quantized import KINDS, quantize
from transformers import DynamicCache

import lcpatch

every_kind = pytest.mark.parametrize("kind", KINDS)
every_cache = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "parameter" or name == "h2o" else pytest.mark.slow)
        for name in ALL
        for kind in KINDS
    ],
)
CUT = [60, 10, *[1] * (LENGTH - 70)]


def int8_model(name, kind, dtype=torch.float32, **settings):
    return make_model(name, quantize(build(**settings).to(dtype), kind))


def test_the_weights_are_int8():
    """Or this file proves nothing."""
    q_proj = int8_model("h2o", "parameter").model.layers[0].self_attn.q_proj
    assert q_proj.weight.dtype == torch.int8
    assert not list(int8_model("h2o", "buffers").model.layers[0].self_attn.parameters())
    with pytest.raises(NotImplementedError):
        int8_model("h2o", "tensor").model.layers[0].self_attn.q_proj.weight.flatten()


@every_cache
def test_the_logits_are_those_of_a_full_cache_or_near(name, kind):
    model, ids, mask = int8_model(name, kind), tokens(3, LENGTH), left_padding([0, 37, 11])
    want = feed(model, ids, DynamicCache(config=model.config), CUT, mask)[mask.bool()]
    got = feed(model, ids, make(name, model), CUT, mask)[mask.bool()]
    assert distance(got, want) <= model_budget(build(), ids)
    if name != "s2":
        assert distance(feed(model, ids, make(name, model, small=True), CUT, mask)[mask.bool()], want) > 1e-3


@every_cache
def test_what_is_kept_is_in_the_models_dtype(name, kind, tmp_path):
    """Through generate and a file, in bf16: nothing is stored as int8, nor in fp32."""
    model, ids = int8_model(name, kind, torch.bfloat16), tokens(2, 50)
    cache = make(name, model, small=True)
    model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    assert {layer.dtype for x in (cache, loaded) for layer in x.layers} == {torch.bfloat16}
    new = tokens(2, 4, seed=3)
    assert torch.equal(*(feed(model, new, x, [1] * 4) for x in (cache, loaded)))


@every_kind
def test_a_file_knows_quantised_weights_from_others(kind, tmp_path):
    model, other = int8_model("h2o", kind), int8_model("h2o", kind)
    cache = make("h2o", model)
    feed(model, tokens(1, 20), cache, [20])
    path = cache.save(tmp_path / "prefix")
    changed = build()
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight *= -1
    with pytest.raises(lcpatch.core.errors.StoreError, match="weights"):
        lcpatch.load_cache(path, quantize(changed, kind))
    assert lcpatch.load_cache(path, other).get_seq_length() == 20


@every_kind
@pytest.mark.parametrize("sinks", [None, "prefix:2"])
def test_patches_and_their_report(sinks, kind):
    """What the report says runs is chosen by the dtype of the numbers, not of the packed weights."""
    model = lcpatch.apply(int8_model("h2o", kind), "sink", num_sinks=2, window=9, sinks=sinks)
    assert [row.why for row in lcpatch.report(model)] == ["impl='auto' on cpu, float32"] * 2
    assert model(tokens(1, 40)).logits.isfinite().all()
