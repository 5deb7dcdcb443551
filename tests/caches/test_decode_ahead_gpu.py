"""`decode_ahead` on a GPU: a compiled token waits for nothing, and its tokens are those of plain `generate`."""

import pytest
import torch
from models import build, tokens
from transformers import StoppingCriteria

import lcpatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
CACHES = {"h2o": lcpatch.H2OCache, "sink": lcpatch.SinkCache, "cluster": lcpatch.ClusterCache}


@pytest.fixture(autouse=True)
def counted():
    """Nothing is compiled or kept by a kernel yet: a test's result must not hang on what its process ran before."""
    from torch._dynamo.utils import counters

    from lcpatch_kernels.block_sparse._triton_common import _recorded, _table

    torch._dynamo.reset()
    _table.cache_clear()
    _recorded.clear()
    counters.clear()
    return counters


class NoWaits(StoppingCriteria):
    """After so many tokens whatever waits for the device is an error, and again allowed at the end."""

    def __init__(self, after, until):
        self.after, self.until, self.calls = after, until, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls in (self.after, self.until):
            torch.cuda.set_sync_debug_mode("error" if self.calls == self.after else "default")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("name", CACHES)
def test_a_compiled_token_waits_for_nothing(name, settings):
    model, ids = build(**SIZES).cuda(), tokens(2, 90).cuda()
    cache = CACHES[name](model, 400, compiled=True)  # nothing goes: making room waits
    given = {"past_key_values": cache, "custom_generate": lcpatch.decode_ahead, "max_new_tokens": 60, **settings}
    try:
        model.generate(ids, stopping_criteria=[NoWaits(20, 55)], **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.get_seq_length() == 90 + 59


@pytest.mark.parametrize("name", CACHES)
def test_tokens_are_those_of_generate_and_nothing_is_compiled_anew(name, counted):
    model, ids = build(**SIZES).cuda(), tokens(2, 90).cuda()
    outs, graphs = [], set()
    for how in ({}, {"custom_generate": lcpatch.decode_ahead}):
        for sampled in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
            torch.manual_seed(0)
            given = {"past_key_values": CACHES[name](model, 40, evict_every=7, compiled=True), "max_new_tokens": 60}
            outs.append(model.generate(ids, **given, **sampled, **how))
            graphs.add(counted["stats"]["unique_graphs"])
            outs.append(torch.rand(1, device="cuda").cpu())
    assert len(graphs) == 1
    # The same graph on the same numbers: to the bit, unlike another kernel.
    for plain, ahead in zip(outs[:4], outs[4:], strict=True):
        assert torch.equal(plain, ahead)
    assert not counted["inductor"]["cudagraph_skips"]
