"""`torch.compile` without a graph break, through AOTAutograd (`aot_eager`), forward and backward."""

import pytest
import torch
from models import SHORT, TOKENS, build, tokens
from noise import distance, model_budget
from schedules import collate, documents, pad, plain
from torch import nn
from transformers import StaticCache

import lcpatch

METHODS = tuple(lcpatch.methods())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def patched(method: str, family: str = "llama") -> tuple[nn.Module, float]:
    """The model and the budget of its logits."""
    model = build(family)
    allowed = model_budget(model, tokens())
    return lcpatch.apply(model, method, mode="always", **SHORT.get(method, {})), allowed


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=[] if family == "llama" or method == "s2" else pytest.mark.slow)
        for family in ("llama", "gemma2", "gpt_oss")
        for method in METHODS
    ],
)
def test_forward(family: str, method: str):
    model, allowed = patched(method, family)
    ids = tokens(2)
    with torch.no_grad():
        assert distance(compiled(model)(ids, use_cache=False).logits, model(ids, use_cache=False).logits) <= allowed


def test_backward():
    model, _ = patched("s2")
    ids, grads = tokens(2), []
    for run in (model, compiled(model)):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(*grads, strict=True):  # the same kernels in the same order, but for fused additions
        assert distance(a, b) <= TOKENS * eps * float(b.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str):
    model, allowed = patched("s2")
    docs = documents()
    ids, mask = pad(docs, side)
    with torch.no_grad():
        logits = compiled(model)(ids, attention_mask=mask, use_cache=False).logits
        for row, real, doc in zip(logits, mask.bool(), docs, strict=True):
            assert distance(row[real], plain(model, doc)) <= allowed


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packing_by_cu_seq_lens(family: str, use_cache: bool):
    model, allowed = patched("sf", family)
    docs = documents()
    with torch.no_grad():
        batch = collate(docs)
        # Under tracing restarting positions assert; cu_seq_lens say it all.
        logits = compiled(model)(**batch, use_cache=use_cache).logits[0]
        for part, doc in zip(logits.split([len(d) for d in docs]), docs, strict=True):
            assert distance(part, plain(model, doc)) <= allowed


def test_packing_by_positions_asserts():
    """Whether positions restart cannot be read while tracing; silence would let documents see each other."""
    model, _ = patched("s2")
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]
    run = compiled(model)
    with pytest.raises(RuntimeError, match="cu_seq_lens"), torch.no_grad():
        run(tokens(), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_decoding_with_a_static_cache(family: str):
    model, allowed = patched("s2", family)
    ids, run = tokens(), compiled(model)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 9)
    with torch.no_grad():
        prompt, *steps = ids.split([60, *[1] * (TOKENS - 60)], dim=1)
        parts = [model(prompt, past_key_values=cache).logits[0]]
        parts += [run(step, past_key_values=cache).logits[0] for step in steps]
        assert distance(torch.cat(parts), plain(model, ids[0])) <= allowed


def test_mode_is_followed_after_compiling():
    """Switching `train()` recompiles; it does not keep the first mode."""
    model = build()
    ids = tokens()
    dense = model(ids, use_cache=False).logits
    allowed = model_budget(model, ids)
    lcpatch.apply(model, "shift", group_size=22)
    run = compiled(model)
    with torch.no_grad():
        sparse = run.train()(ids, use_cache=False).logits
        assert distance(run.eval()(ids, use_cache=False).logits, dense) <= allowed < distance(sparse, dense)
