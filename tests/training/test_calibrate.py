"""The share of attention inside a pattern, against eager attention's own weights under the pattern's dense mask."""

import pytest
import torch
from models import SHORT, build, tokens
from noise import FACTOR

import lcpatch
from lcpatch.hf.layers import shape_of
from lcpatch.patterns import patterns
from lcpatch.training.calibrate import Mass, attention_mass
from lcpatch_kernels.block_sparse import dense


def by_hand(model, spec, ids):
    """[layers, heads] from the weights of eager attention, in the model's dtype."""
    weights = model(ids, output_attentions=True, use_cache=False).attentions
    index = (torch.arange(n) for n in weights[0].shape)
    keep = dense.mask_mod(spec, None, ids.shape[1], ids.shape[1], ids.device)(*torch.meshgrid(*index, indexing="ij"))
    return torch.stack([(w * keep).sum(-1).mean((0, 2)) for w in weights]).double()


@pytest.mark.parametrize("method", ["s2", "sf", "sink"])
def test_mass_is_that_of_the_eager_weights(method: str):
    model, ids = build(), tokens(2)
    options = SHORT[method]
    found = attention_mass(model, {"method": method, "options": options}, [ids[:1], ids[1:]])
    specs = [patterns.get(method)(**options).spec(shape_of(model.config, rank, 2)) for rank in range(2)]
    with torch.no_grad():
        rough, exact = (
            torch.stack([by_hand(build(attn="eager").to(dtype), spec, ids)[n] for n, spec in enumerate(specs)])
            for dtype in (torch.float32, torch.float64)
        )
    allowed = FACTOR * float((rough - exact).abs().max())
    assert float((found.inside - exact).abs().max()) <= allowed
    assert float((found.inside.flip(0) - exact).abs().max()) > 100 * allowed  # the layers are told apart
    assert 0.05 < float(found.inside.min()) < float(found.inside.max()) < 1
    assert found.layers == (0, 1)
    assert found.density == pytest.approx(sum(spec.density(ids.shape[1]) for spec in specs) / 2)


def test_the_model_is_left_as_it_was():
    model, ids = build().train(), tokens()
    before = {name: value for module in model.modules() for name, value in vars(module).items() if name == "_lcpatch"}
    want = model(ids).logits
    everything = attention_mass(model, lcpatch.S2(stride=1), [ids])
    assert torch.allclose(everything.inside, torch.ones_like(everything.inside), atol=FACTOR * 1.2e-7)
    assert model.training
    assert torch.equal(model(ids).logits, want)
    assert not before
    assert not hasattr(model.config, "lcpatch")
    assert not any(module._forward_pre_hooks for module in model.modules())
    lcpatch.apply(model, "sf")
    with pytest.raises(ValueError, match=r"the model is patched: lcpatch.remove\(model\) first"):
        attention_mass(model, "s2", [ids])
    with pytest.raises(ValueError, match="at least one text"):
        attention_mass(lcpatch.remove(model), "s2", [])


def test_the_layers_that_lose_most_stay_dense():
    inside = torch.tensor([[0.9, 0.8], [0.2, 0.4], [0.99, 0.97], [0.6, 0.5]], dtype=torch.float64)
    mass = Mass(inside, (0, 2, 4, 6), 0.1)
    assert mass.sparse_layers(1) == (0, 4, 6)
    assert mass.sparse_layers(0.5) == (0, 4)
    assert mass.kv_heads(1).tolist() == [[pytest.approx(x)] for x in (0.85, 0.3, 0.98, 0.55)]
    with pytest.raises(ValueError, match=r"keep_dense=4 must leave some of 4 layers sparse"):
        mass.sparse_layers(4)
