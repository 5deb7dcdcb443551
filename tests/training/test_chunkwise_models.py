"""Models with ways of their own around their cache: the exact gradient by chunks, or a refusal; never another."""

import copy

import pytest
import torch
import transformers
from chunkwise_cases import assert_same, chunked, far, plain
from models import SHORT, VOCAB, build, tokens
from torch import nn

import lcpatch
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.hf.state import ATTRIBUTE
from lcpatch.training import chunkwise, support

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
SETTINGS = {
    "DiffLlama": {},  # attends twice, to either half of its values
    "JetMoe": {"kv_channels": 16, "num_experts_per_tok": 2, "num_local_experts": 4},  # repeats keys for its experts
}


def make(prefix: str, **changes) -> nn.Module:
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **SETTINGS[prefix], **changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).train()


@pytest.mark.parametrize("prefix", ["DiffLlama", "JetMoe"])
def test_a_model_that_does_more_than_attend_to_what_its_cache_returns(prefix: str, monkeypatch: pytest.MonkeyPatch):
    """Our attention would be given something else: refused where it was asked for, left alone where it was not."""
    model, ids = make(prefix), tokens(2)
    want = plain(copy.deepcopy(model).double(), ids, ids)
    allowed = 2 * far(plain(model, ids, ids)[1], want[1])  # DiffLlama sums its lambdas in fp32 whatever its dtype
    assert 0 < allowed < 1e-3
    for options in ({"attention": "lcpatch"}, {"attention": "cudnn"}, {"offload": True}):
        with pytest.raises(UnsupportedModelError, match="use attention='own'"):
            chunked(model, ids, ids, 16, **options)
    monkeypatch.setattr(support, "_has_kernel", lambda base: True)  # "auto" as on a GPU
    for size in (16, 75):
        assert_same(chunked(model, ids, ids, size), want, allowed)
    chunkwise.rehearse(model, length=40, chunk_size=16)
    assert model.config._attn_implementation == "sdpa"


def test_a_patched_model_that_does_more_than_attend(monkeypatch: pytest.MonkeyPatch):
    """Its patch stays on, by chunks too, and nothing of the attempt is left on it."""
    model, ids = lcpatch.apply(make("DiffLlama"), "s2", **SHORT["s2"]), tokens(2)
    want, budget = plain(copy.deepcopy(model).double(), ids, ids), plain(model, ids, ids)
    monkeypatch.setattr(support, "_has_kernel", lambda base: True)
    assert_same(chunked(model, ids, ids, 16), want, 2 * far(budget[1], want[1]))
    assert all(m.__dict__[ATTRIBUTE].layer is None for m in model.modules() if ATTRIBUTE in m.__dict__)


def test_a_model_that_attends_to_other_keys_than_its_cache_returned(monkeypatch: pytest.MonkeyPatch):
    model, ids = build().double().train(), tokens(2)
    update = chunkwise.ChunkCache.update
    seen = []

    def another_layers(self, *args, **kwargs):
        seen.append(update(self, *args, **kwargs))
        return seen[0]

    monkeypatch.setattr(chunkwise.ChunkCache, "update", another_layers)
    with pytest.raises(UnsupportedModelError, match="layer 1 attends to other keys or values than its cache returned"):
        chunked(model, ids, ids, 16, attention="lcpatch")
