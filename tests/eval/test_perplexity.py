"""`token_nll`: the plain loss of every family, without the logits of more than a chunk."""

import models
import pytest
import torch
from noise import distance, model_budget
from torch.nn import functional as F
from transformers import DynamicCache

import lcpatch
from lcpatch.eval import perplexity, token_nll


def plain(model, ids):
    """The same from all logits at once."""
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_equals_the_plain_loss(family):
    behind_the_head = {"gemma2": {"final_logit_softcapping": 1.5}, "granite": {"logits_scaling": 3.0}}
    model = models.build(family, **behind_the_head.get(family, {}))
    ids = models.tokens(2)
    budget = 2 * model_budget(model, ids)  # a loss is the difference of a logit and a logsumexp of logits
    assert distance(token_nll(model, ids, chunk_size=16), plain(model, ids)) <= budget


@pytest.mark.parametrize("method", models.SHORT)
def test_measures_the_patched_model(method):
    model, ids = models.build(), models.tokens()
    dense, budget = token_nll(model, ids), 2 * model_budget(model, ids)
    lcpatch.apply(model, method, mode="always", **models.SHORT[method])
    sparse = token_nll(model, ids, chunk_size=16)
    assert distance(sparse, plain(model, ids)) <= budget
    assert distance(sparse, dense) > 100 * budget


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_nan_and_change_nothing(side):
    model, ids = models.build(), models.tokens()
    expected, budget = token_nll(model, ids), 2 * model_budget(model, ids)
    pads = (11, 0) if side == "left" else (0, 11)
    real = F.pad(torch.ones_like(ids), pads)
    nll = token_nll(model, F.pad(ids, pads), attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(0)[:, :-1])
    assert nll.isnan().sum() == 11
    assert distance(nll[~nll.isnan()], expected[0]) <= budget
    assert perplexity(nll) == pytest.approx(float(expected.mean().exp()), rel=budget)


def test_no_more_logits_than_a_chunk():
    model, ids = models.build(), models.tokens()
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    token_nll(model, ids, chunk_size=16)
    handle.remove()
    assert max(rows) == 16
    assert not model.base_model._forward_hooks


def test_leaves_no_hook_after_an_error():
    def fail(module, args, output):
        raise RuntimeError("head")

    model, ids = models.build(), models.tokens()
    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="head"):
        token_nll(model, ids)
    assert not model.base_model._forward_hooks


def test_keeps_the_cache_it_is_given():
    model, ids = models.build(), models.tokens()
    cache = DynamicCache(config=model.config)
    without = token_nll(model, ids)
    assert distance(token_nll(model, ids, past_key_values=cache), without) <= 2 * model_budget(model, ids)
    assert cache.get_seq_length() == ids.shape[1] - 1
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert model.generate(ids, past_key_values=cache, **given).equal(model.generate(ids, **given))


def test_bad_input():
    model = models.build()
    with pytest.raises(ValueError, match="at least two tokens"):
        token_nll(model, models.tokens(length=1))
    with pytest.raises(ValueError, match="no language-model head"):
        token_nll(model.model, models.tokens())
