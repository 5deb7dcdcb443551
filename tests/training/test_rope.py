"""Context extension: factors, composition with a model's own scaling, and what is refused."""

import copy

import pytest
import torch
from models import FAMILIES, build, config_for, tokens
from transformers import GPT2Config

import lcpatch
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.hf import attention
from lcpatch.training.rope import KINDS, extend


def rope(config) -> dict:
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_linear_is_position_interpolation(family: str):
    """Queries at 4 x position under factor 4 are those of the original at that position."""
    config = config_for(family)
    extended = extend(config, 2000)
    assert rope(extended)["factor"] == 4
    assert rope(extended)["rope_theta"] == rope(config)["rope_theta"]
    assert extended.max_position_embeddings == 2048
    assert config.max_position_embeddings == 512
    assert "factor" not in rope(config)
    if "full_attention" in config.rope_parameters:
        assert extended.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
        return  # windows keep their positions, so stretched ones change what they see
    ids = tokens(1, 30)
    positions = torch.arange(30)[None]
    with torch.no_grad():
        want = build(family)(ids, position_ids=positions).logits
        model = build(family, config=copy.deepcopy(extended))
        assert torch.equal(model(ids, position_ids=4 * positions).logits, want)
        assert not torch.equal(model(ids, position_ids=positions).logits, want)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_extending_twice_is_extending_once(kind: str):
    config = config_for("llama")
    twice, once = extend(extend(config, 1024, kind), 4096, kind), extend(config, 4096, kind)
    assert twice.rope_parameters == once.rope_parameters
    assert twice.max_position_embeddings == once.max_position_embeddings == 4096


@pytest.mark.parametrize("limit", [512, 640, 2048])
def test_a_yarn_that_its_limit_does_not_tell_of(limit: int):
    """Qwen's users add one beside max_position_embeddings as they were: what it reaches is not scaled again."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    config = config_for("llama", max_position_embeddings=limit, rope_parameters=yarn)
    within, beyond = extend(config, 2048, "linear"), extend(config, 4000, "yarn")
    assert within.rope_parameters == config.rope_parameters
    assert beyond.rope_parameters == {**config.rope_parameters, "factor": 8.0}
    assert (within.max_position_embeddings, beyond.max_position_embeddings) == (2048, 4096)


def test_a_linear_scaling_that_is_multiplied_is_told():
    """Whether it is in the limit already, a config does not say."""
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    with pytest.warns(UserWarning, match=r"divides its positions by 4.0 already, which 2 multiplies"):
        extend(config_for("llama", rope_parameters=linear), 1024, "linear")


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_models_positions_nothing_changes(kind: str):
    config = config_for("llama")
    assert extend(config, 512, kind) is config


def test_dynamic_scales_beyond_the_trained_length_only():
    """transformers counts from max_position_embeddings, so that must stay the trained length."""
    config = extend(config_for("llama"), 2048, "dynamic")
    assert config.max_position_embeddings == 512
    short, long = torch.arange(30)[None], torch.arange(1000)[None]
    with torch.no_grad():
        model, plain = build(config=config), build()
        assert torch.equal(model(tokens(1, 30), position_ids=short).logits, plain(tokens(1, 30)).logits)
        different = model(tokens(1, 1000), position_ids=long).logits != plain(tokens(1, 1000)).logits
        assert different.any()


@pytest.mark.parametrize(
    ("own", "kind", "says"),
    [
        ("yarn", "linear", "what composes with it: yarn"),
        ("linear", "dynamic", "what composes with it: linear"),
        ("dynamic", "dynamic", "nothing composes with it"),
    ],
)
def test_a_scaling_that_would_be_destroyed_is_refused(own: str, kind: str, says: str):
    with pytest.raises(UnsupportedModelError, match=rf"rope_type='{own}' already, .*{says}"):
        extend(extend(config_for("llama"), 1024, own), 5000, kind)


def test_a_model_without_rotary_positions_is_refused():
    with pytest.raises(UnsupportedModelError, match="gpt2 has no rotary positions"):
        extend(GPT2Config(), 4096)
    with pytest.raises(ValueError, match=r"rope='ntk' is not one of linear, yarn, dynamic, none"):
        extend(config_for("llama"), 4096, "ntk")


def test_a_patched_model_warns_beyond_its_positions_unless_they_stretch(recwarn):
    ids = tokens(1, 700)
    for config, warned in ((config_for("llama"), True), (extend(config_for("llama"), 2048, "dynamic"), False)):
        recwarn.clear()
        attention._warn.cache_clear()
        model = lcpatch.apply(build(config=config), "sink", window=30)
        with torch.no_grad():
            model(ids)
        assert any("longer than the 512 positions" in str(w.message) for w in recwarn) == warned
