"""SpaCO: unbiased by enumeration of every outcome, SeCO where everything is kept; the published draw is not."""

from itertools import combinations, product

import pytest
import torch
from chunkwise_cases import Gradients, assert_same, chunked, far, plain, rounding
from models import build, tokens

from lcpatch.training import chunkwise, spaco

SIZE = 16  # of 74 tokens with a next one: five chunks, the last of ten tokens


@pytest.fixture(scope="module")
def model():
    """Of a family that computes in float64 throughout: RMSNorm elsewhere rounds gradients to fp32."""
    return build("gpt_neox").double().train()


@pytest.fixture(scope="module")
def ids():
    return tokens(2)


def expectation(model, ids, outcomes) -> tuple[float, Gradients]:
    """Mean loss and gradient over (probability, plan)."""
    loss, mean = 0.0, {}
    for probability, plan in outcomes:
        one, grads = chunked(model, ids, ids, SIZE, estimator=lambda count, plan=plan: plan)
        loss += probability * one
        for name, grad in grads.items():
            mean[name] = mean.get(name, 0) + probability * grad
    return loss, mean


def coins(keep):
    for outcome in product((False, True), repeat=5):
        probability = 1.0
        for up, p in zip(outcome, keep, strict=True):
            probability *= p if up else 1 - p
        yield probability, spaco.bernoulli(outcome, keep)


@pytest.mark.parametrize("keep", [[0.5] * 5, [0.9, 0.25, 0.6, 1.0, 0.4]])
def test_bernoulli_is_unbiased(model, ids, keep):
    """The mean over all outcomes, weighed by their probabilities, is the exact gradient and the exact loss."""
    got = expectation(model, ids, [(p, plan) for p, plan in coins(keep) if p])
    assert_same(got, plain(model, ids, ids), 2**5 * rounding(model))


def test_the_published_draw_is_biased(model, ids):
    """And so is what it becomes with the loss scaled too: chains through several chunks survive a draw too rarely."""
    want, allowed = plain(model, ids, ids), 2**5 * rounding(model)
    draws = [tuple(n in chosen for n in range(5)) for chosen in combinations(range(5), 2)]
    printed = [spaco.paper(draw) for draw in draws]
    scaled = [spaco.Plan(plan.kept, plan.hop, plan.hop) for plan in printed]
    for plans in (printed, scaled):
        bias = far(expectation(model, ids, [(1 / len(draws), plan) for plan in plans])[1], want[1])
        assert bias > 1e6 * allowed


@pytest.mark.parametrize("estimator", ["bernoulli", "paper"])
def test_everything_kept_is_seco(model, ids, estimator):
    assert_same(chunked(model, ids, ids, SIZE, estimator=estimator, keep=1.0), plain(model, ids, ids), rounding(model))


def test_what_is_drawn():
    generator = torch.Generator().manual_seed(0)
    plans = [spaco.draw("bernoulli", 1000, 0.25, generator) for _ in range(4)]
    kept = [sum(plan.kept) for plan in plans]
    deviation = (1000 * 0.25 * 0.75) ** 0.5
    assert len({plan.kept for plan in plans}) == 4
    assert all(abs(n - 250) < 5 * deviation for n in kept)
    assert set(plans[0].loss) == set(plans[0].hop) == {4.0}
    for keep, count in ((1 / 16, 1), (0.5, 3), (1.0, 6)):
        plan = spaco.draw("paper", 6, keep, generator)
        assert sum(plan.kept) == count
        assert set(plan.hop) == {6 / count}
        assert set(plan.loss) == {1.0}
    again = spaco.draw("bernoulli", 1000, 0.25, torch.Generator().manual_seed(0))
    assert again == plans[0]


def test_chunks_that_are_not_kept_are_not_run(model, ids, monkeypatch):
    runs = []
    decode = chunkwise._Run._decode
    monkeypatch.setattr(chunkwise._Run, "_decode", lambda run, m, *at: runs.append(at[0]) or decode(run, m, *at))
    plan = spaco.bernoulli((False, True, False, False, True), 0.5)
    chunked(model, ids, ids, SIZE, estimator=lambda count: plan)
    assert runs == [0, 16, 32, 48, 64, 16]
    runs.clear()
    plan = spaco.bernoulli((True, False, True, False, False), 0.5)
    chunked(model, ids, ids, SIZE, estimator=lambda count: plan)
    assert runs == [0, 16, 32, 0]  # what follows would be read by none
    runs.clear()
    model.zero_grad(set_to_none=True)
    nothing = spaco.bernoulli((False,) * 5, 0.5)
    assert chunked(model, ids, ids, SIZE, estimator=lambda count: nothing) == (0.0, {})
    assert not runs


def test_parts_of_the_gradient_by_chain_length(model, ids):
    """They add up to the gradient, and the first is what is left without hops."""
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = before[name]
    norms, shares = spaco.chain_norms(model, input_ids=ids, labels=ids, chunk_size=SIZE)
    assert all(p.grad is before[name] for name, p in model.named_parameters())
    first = chunked(model, ids, ids, SIZE, estimator=lambda count: spaco.seco(count, hop=0.0))[1]
    whole = plain(model, ids, ids)[1]
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (first, whole)]
    assert len(norms) == len(shares) == 5
    assert norms[0] == pytest.approx(float(flat[0].norm()), rel=1e-9)
    assert shares[0] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), rel=1e-9)
    assert shares[-1] == pytest.approx(1, abs=1e-12)
    assert shares[0] < 0.99  # so that the rest is not nothing


def test_refusals(model, ids):
    for keep in (0.0, 1.5, [0.5, 0.5], [0.5, 0.5, 0.5, 0.5, -1.0]):
        with pytest.raises(ValueError, match=r"keep"):
            chunked(model, ids, ids, SIZE, estimator="bernoulli", keep=keep)
    with pytest.raises(ValueError, match=r"keep=0.5 with estimator='seco', which keeps every chunk: take 'bernoulli'"):
        chunked(model, ids, ids, SIZE, keep=0.5)
    with pytest.raises(ValueError, match=r"'spaco' is not one of seco, bernoulli, paper"):
        chunked(model, ids, ids, SIZE, estimator="spaco")
    with pytest.raises(ValueError, match=r"plan speaks of 3 chunks, but the text has 5"):
        chunked(model, ids, ids, SIZE, estimator=lambda count: spaco.seco(3))
