"""`sinks=`: sink tokens and learnable sink logits with any method."""

import pytest
import torch
from models import SHORT, attention_layers, build, tokens
from noise import distance, model_budget
from torch import nn

import lcpatch
from lcpatch import S2, SF, Shift, Sink
from lcpatch.hf.state import SINK_LOGIT

METHODS = tuple(lcpatch.methods())
S2_SHORT = SHORT["s2"]


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
