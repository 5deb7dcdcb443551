"""Models whose layers lie in different places, as `device_map` leaves them: every cache goes with them."""

import pytest
import torch
from cache_cases import ALL, feed, generated, left_padding, make, make_model, placed
from models import build, tokens

import lcpatch

pytest.importorskip("accelerate")

SPREAD = {"rest": "cpu", "0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}


@pytest.mark.parametrize("name", ALL)
def test_layers_in_memory_and_on_disk_generate_what_they_do_in_one_place(name, tmp_path):
    ids, mask = tokens(2, 50), left_padding([0, 11], 50)
    model = placed(name, tmp_path, SPREAD)
    assert {p.is_meta for p in model.model.layers[1].parameters()} == {True}
    whole = make_model(name, num_hidden_layers=4)
    outputs = [generated(name, m, ids, mask) for m in (whole, model)]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert {p.is_meta for p in model.model.layers[1].parameters()} == {True}


@pytest.mark.parametrize("name", ["h2o", "tiered"])
def test_its_caches_can_be_saved(name, tmp_path):
    model, ids = placed(name, tmp_path, SPREAD), tokens(2, 60)
    cache = make(name, model, small=True)
    feed(model, ids[:, :50], cache, [45, *[1] * 5])
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    assert torch.equal(*(feed(model, ids[:, 50:], x, [1] * 10) for x in (cache, loaded)))


def test_other_weights_would_be_seen(tmp_path):
    """Negative control: a layer that came back from disk changed gives other tokens."""
    ids, model = tokens(2, 50), placed("h2o", tmp_path, SPREAD)
    changed = build(num_hidden_layers=4)
    torch.nn.init.zeros_(changed.model.layers[1].self_attn.o_proj.weight)
    outputs = [m.generate(ids, past_key_values=make("h2o", m), max_new_tokens=5) for m in (model, changed)]
    assert not torch.equal(*outputs)
