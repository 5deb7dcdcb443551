"""The lm-eval model: by itself without lm-eval, and where that is installed, a task on a patched model with a cache."""

import sys
from importlib.util import find_spec

import models
import pytest
import torch
from eval_cases import VOCAB, model, tokenizer
from noise import distance, model_budget

from lcpatch.eval import harness

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


def test_without_lm_eval_it_says_how(monkeypatch):
    harness.lm_class.cache_clear()
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'lcpatch\[lm-eval\]'"):
        harness.lm_class()


def build(**given):
    tok = tokenizer(True)
    tok.pad_token = tok.eos_token
    return harness.lm_class()(pretrained=model(), tokenizer=tok, device="cpu", **given)


@needs_lm_eval
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_cache_gives_the_logits_of_the_full_forward(chunk):
    ids = torch.randint(3, VOCAB, (2, 50), generator=torch.Generator().manual_seed(0))
    patched, cached = build(method="s2", **models.SHORT["s2"]), build(
        method="s2", cache="s2", chunk=chunk, **models.SHORT["s2"]
    )  # fmt: skip
    expected, budget = patched._model_call(ids), model_budget(model(), ids)
    assert distance(cached._model_call(ids), expected) <= budget
    assert distance(build()._model_call(ids), expected) > 100 * budget


@needs_lm_eval
def test_requests_of_both_kinds():
    from lm_eval.api.instance import Instance

    def ask(lm):
        ranked = [Instance("loglikelihood", {}, ("The answer is", end), 0) for end in (" yes", " no")]
        written = [Instance("generate_until", {}, ("The answer", {"until": ["\n\n"], "max_gen_toks": 8}), 0)]
        return [score for score, _ in lm.loglikelihood(ranked)], lm.generate_until(written)

    options = {"method": "s2", **models.SHORT["s2"]}
    (costs, words), (other_costs, other_words) = ask(build(**options)), ask(build(cache="s2", **options))
    budget = 8 * model_budget(model(), torch.arange(20)[None])  # a continuation has a few tokens
    assert all(abs(a - b) <= budget for a, b in zip(costs, other_costs, strict=True))
    assert words == other_words
