"""Prefix sinks on a GPU, in bf16 and through the Triton kernels: as exact as without, for what they cost."""

import copy

import pytest
import torch
from chunkwise_cases import far, mean_loss, taken
from models import SHORT, attention_layers, build, tokens
from noise import FACTOR, distance
from test_prefix_sinks import sunk
from torch import nn
from transformers import DynamicCache

import lcpatch
from lcpatch.hf.state import SINK_VALUE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"head_dim": 64, "initializer_range": 0.15}


def copies(method: str):
    """The model with sinks in bf16 on the GPU, in float64 on the CPU, and both without sinks: the same weights."""
    for plain in (False, True):
        for dtype, device in ((torch.bfloat16, "cuda"), (torch.float64, "cpu")):
            model = build(**SIZES)
            model = lcpatch.apply(model, method, mode="always", **SHORT[method]) if plain else sunk(model, method)
            yield model.to(torch.bfloat16).to(device, dtype)  # rounded alike


@pytest.mark.parametrize("method", SHORT)
def test_bf16_costs_what_it_costs_without(method: str):
    """Prefill, and a chunk and tokens after it through a cache."""
    ids = tokens(2)
    half, exact, plain, plain_exact = copies(method)
    with torch.no_grad():
        want = exact(ids).logits
        allowed = FACTOR * distance(plain(ids.cuda()).logits.cpu(), plain_exact(ids).logits)
        assert distance(half(ids.cuda()).logits.cpu(), want) <= allowed
        for cache in (lcpatch.H2OCache(half, budget=4096), DynamicCache(config=half.config)):
            parts = ids.cuda().split([60, 10, *[1] * 5], 1)
            got = torch.cat([half(part, past_key_values=cache).logits for part in parts], 1)
            assert distance(got.cpu(), want) <= allowed
        for layer in attention_layers(half):
            nn.init.zeros_(getattr(layer, SINK_VALUE))
        assert distance(half(ids.cuda()).logits.cpu(), want) > allowed


def test_compiled_in_training():
    """Forward and backward of the compiled model under autocast are as exact as without a compiler."""
    model, ids = sunk(build(**SIZES)), tokens(2)
    want = gradients(copy.deepcopy(model).double(), ids)
    model, ids = model.cuda(), ids.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        allowed = FACTOR * far(gradients(model, ids), want)
        assert far(gradients(torch.compile(model), ids), want) <= allowed
    assert allowed < 1


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss, by the names that the model has uncompiled."""
    model.zero_grad(set_to_none=True)
    mean_loss(model(ids, use_cache=False).logits.float(), ids).backward()
    return {name.removeprefix("_orig_mod."): grad.cpu() for name, grad in taken(model).items()}
