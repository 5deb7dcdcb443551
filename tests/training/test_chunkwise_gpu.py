"""On a GPU: gradients in bf16 within twice a plain backward's error, streams that do not race, memory's growth."""

import copy

import pytest
import torch
from models import SHORT
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lcpatch
from lcpatch.training import chunkwise, spaco

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 512, "max_position_embeddings": 1 << 16}


def make(num_layers: int = 3, heads: int = 8, kv_heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).cuda().to(torch.bfloat16).train()


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(10, 1000, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def gradient(model: nn.Module, run) -> torch.Tensor:
    model.zero_grad()
    run(model)
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def plain(tokens: torch.Tensor, labels: torch.Tensor, **inputs):
    return lambda model: model(tokens, labels=labels, use_cache=False, **inputs).loss.backward()


def chunks(tokens: torch.Tensor, labels: torch.Tensor, **options):
    return lambda model: chunkwise.backward(model, input_ids=tokens, labels=labels, **options)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("patch", [None, "s2", "sf"])
@pytest.mark.parametrize("rows", ["whole", "left-padded", "packed"])
def test_gradients_in_bf16(rows: str, patch: str | None, offload: bool):
    model, tokens = make(), ids(1301, 2)
    labels, inputs = tokens.clone(), {}
    if rows == "left-padded":
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][1, :600] = 0
        labels[1, :601] = -100
    elif rows == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (500, 301, 500)])[None].cuda()
    if patch is not None:
        lcpatch.apply(model, patch, **SHORT[patch])
    exact = gradient(copy.deepcopy(model).float(), plain(tokens, labels, **inputs))
    budget = 2 * error(gradient(model, plain(tokens, labels, **inputs)), exact)
    options = {"chunk_size": 256, "offload": offload, **inputs}
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert error(gradient(model, chunks(tokens, labels, **options)), exact) <= budget
    cut = gradient(model, chunks(tokens, labels, estimator=lambda k: spaco.seco(k, hop=0.0), **options))
    assert error(cut, exact) > budget


@pytest.mark.parametrize("offload", [False, True])
def test_cudnn_in_pieces(offload: bool):
    """Against its own budget: a plain backward through cuDNN's attention."""
    model, tokens = make(), ids(1301, 2)
    exact = gradient(copy.deepcopy(model).float(), plain(tokens, tokens))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        budget = 2 * error(gradient(model, plain(tokens, tokens)), exact)
    options = {"chunk_size": 96, "offload": offload, "attention": "cudnn"}
    assert error(gradient(model, chunks(tokens, tokens, **options)), exact) <= budget


def test_streams_do_not_race():
    """Many chunks and units, ten times: no run is further from the exact gradient than without offloading."""
    model, tokens = make(num_layers=8), ids(4097)
    options = {"chunk_size": 128, "attention": "lcpatch"}
    exact = gradient(copy.deepcopy(model).float(), plain(tokens, tokens))
    budget = 1.5 * error(gradient(model, chunks(tokens, tokens, **options)), exact)
    for _ in range(10):
        assert error(gradient(model, chunks(tokens, tokens, offload=True, **options)), exact) <= budget


@pytest.mark.xdist_group("much memory")
def test_memory():
    """2 kappa a token and what one layer's attention returns; next to nothing when offloaded."""
    model = make(num_layers=32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kappa = 2 * 32 * 4 * 64 * 2

    def peak(length: int, **options) -> int:
        tokens = ids(length)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        chunks(tokens, tokens, chunk_size=1024, **options)(model)
        model.zero_grad()
        return torch.cuda.max_memory_allocated()

    arms = [({}, 2.05), ({"offload": True}, 0.1), ({"attention": "cudnn"}, 2.05)]
    for options, allowed in [*arms, ({"attention": "cudnn", "offload": True}, 0.1)]:
        peak(4097, **options)  # compiles
        slope = (peak(24577, **options) - peak(12289, **options)) / (12288 * kappa)
        assert slope <= allowed, (options, slope)


@pytest.mark.xdist_group("much memory")
def test_rehearsal_has_the_peak_of_the_step():
    model = make(num_layers=16)
    tokens = ids(16385)
    peaks = []
    for run in (
        lambda: chunks(tokens, tokens, chunk_size=1024)(model),
        lambda: chunkwise.rehearse(model, length=16384, chunk_size=1024),
    ):
        run()
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated())
        model.zero_grad()
    assert abs(peaks[0] - peaks[1]) <= 0.02 * peaks[0]


def test_a_pad_that_predicts_where_it_sees_everything():
    model, tokens = make(), ids(301, 2)
    model.set_attn_implementation("eager")
    mask = torch.ones_like(tokens)
    mask[1, :100] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    with pytest.raises(ValueError, match="first token's label to -100"):
        chunkwise.backward(model, input_ids=tokens, labels=labels, attention_mask=mask, chunk_size=64)
    labels[1, 100] = -100
    chunkwise.backward(model, input_ids=tokens, labels=labels, attention_mask=mask, chunk_size=64)
    assert all(p.grad.isfinite().all() for p in model.parameters())
