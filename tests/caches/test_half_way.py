"""A forward that fails on its way through the layers: the next one is refused, never computed from halves."""

import pytest
import torch
from cache_cases import ALL, feed, make, make_model
from models import build, tokens

import lcpatch


class Boom(RuntimeError):
    pass


def failing(model, place, run):
    """Run what fails in the module `place`, as a full GPU would make it."""

    def fail(*_):
        raise Boom

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    try:
        with pytest.raises(Boom):
            run()
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model.layers.1.self_attn.v_proj"])
@pytest.mark.parametrize("name", ALL)
def test_the_next_forward_says_so(name, place):
    """After a prompt that failed, one token that failed, or a turn that did; until it is reset."""
    model, ids = make_model(name), tokens(2, 60)
    for before, num in (([], 20), ([40], 1), ([40, 1], 10)):
        cache = make(name, model, small=True)
        feed(model, ids[:, : sum(before)], cache, before) if before else None
        failing(model, place, lambda num=num, cache=cache: model(ids[:, -num:], past_key_values=cache))
        for again in (num, 1, 5):
            with pytest.raises(RuntimeError, match=r"failed half-way, .* cache.reset\(\) and read"):
                model(ids[:, -again:], past_key_values=cache)
        cache.reset()
        new = make(name, model, small=True)
        assert torch.equal(*(feed(model, ids, x, [40, *[1] * 20]) for x in (cache, new)))


@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model.layers.0.self_attn.o_proj"])
@pytest.mark.parametrize("name", ALL)
def test_it_is_not_saved_over_one_that_is_whole(name, place, tmp_path):
    model, ids = make_model(name), tokens(1, 60)
    cache = make(name, model, small=True)
    feed(model, ids[:, :40], cache, [40])
    whole = cache.save(tmp_path / "prefix.safetensors").read_bytes()
    failing(model, place, lambda: model(ids[:, 40:], past_key_values=cache))
    with pytest.raises(RuntimeError, match="failed half-way"):
        cache.save(tmp_path / "prefix.safetensors")
    assert (tmp_path / "prefix.safetensors").read_bytes() == whole


@pytest.mark.parametrize("name", ["h2o", "retrieval"])
def test_attention_that_fails_within_the_first_layer(name, monkeypatch, tmp_path):
    """Where no layer counts more tokens than another, but this one may hold half a step."""
    model, ids = make_model(name), tokens(2, 60)
    cache = make(name, model, small=True)
    feed(model, ids[:, :40], cache, [40])
    layer = cache.layers[0]

    def fail(*args, **kwargs):
        raise Boom

    inner = "attention" if name == "h2o" else "_read_all"
    monkeypatch.setattr(layer, inner, fail)
    with pytest.raises(Boom):
        model(ids[:, 40:50], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="failed half-way"):
        model(ids[:, 40:50], past_key_values=cache)
    with pytest.raises(RuntimeError, match="failed half-way"):
        cache.save(tmp_path / "prefix.safetensors")


@pytest.mark.parametrize("name", ["h2o", "sink", "cluster", "tiered"])
def test_a_turn_after_compiled_generation_that_failed(name):
    model, ids = make_model(name), tokens(2, 60)
    cache = make(name, model, small=True, compiled=True)
    feed(model, ids[:, :42], cache, [40, 1, 1])
    failing(model, "model.layers.0.mlp", lambda: model(ids[:, 42:43], past_key_values=cache))
    with pytest.raises(RuntimeError, match="failed half-way"):
        model(ids[:, 42:50], past_key_values=cache)


def test_windows_count_too():
    """The window's layer is transformers' own, and the first to be one token ahead."""
    with pytest.warns(UserWarning, match="do not attend"):
        cache = lcpatch.H2OCache(
            model := build("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4),
            24,
        )
    ids = tokens(2, 60)
    feed(model, ids[:, :40], cache, [40])
    failing(model, "model.layers.0.mlp", lambda: model(ids[:, 40:41], past_key_values=cache))
    with pytest.raises(RuntimeError, match="failed half-way"):
        model(ids[:, 40:41], past_key_values=cache)


def test_a_window_ahead_of_layers_that_are_about_to_generate_in_fixed_buffers():
    """Once these have entered, they count where nobody asks."""
    model = build("gemma3_text", layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    with pytest.warns(UserWarning, match="do not attend"):
        cache = lcpatch.H2OCache(model, 24, compiled=True)
    ids = tokens(2, 60)
    feed(model, ids[:, :40], cache, [40])
    failing(model, "model.layers.0.mlp", lambda: model(ids[:, 40:50], past_key_values=cache))
    with pytest.raises(RuntimeError, match="failed half-way"):
        model(ids[:, 50:51], past_key_values=cache)


def test_what_is_refused_before_anything_is_kept_can_be_mended():
    model, ids = build(), tokens(2, 30)
    cache, right = lcpatch.H2OCache(model, 24), torch.ones(2, 30, dtype=torch.long)
    right[0, -3:] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model(ids, attention_mask=right, past_key_values=cache)
    assert torch.equal(
        model(ids, past_key_values=cache).logits, model(ids, past_key_values=lcpatch.H2OCache(model, 24)).logits
    )


def test_a_failed_forward_leaves_nothing_for_one_without_a_cache():
    model, ids = build(), tokens(2, 30)
    want = model(ids, use_cache=False).logits
    cache = lcpatch.H2OCache(model, 24)
    failing(model, "model.layers.1.self_attn.k_proj", lambda: model(ids, past_key_values=cache))
    assert torch.equal(model(ids, use_cache=False).logits, want)
