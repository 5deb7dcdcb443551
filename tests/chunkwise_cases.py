"""What chunkwise backward is compared with: the gradient of one plain forward, and how far rounding may move it."""

from typing import Any

import torch
from models import tokens
from noise import FACTOR, distance
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import lcpatch
from lcpatch.training import chunkwise

Gradients = dict[str, Tensor]


def taken(model: nn.Module) -> Gradients:
    """The model's gradients, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' loss, but in the logits' own precision."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def plain(model: nn.Module, ids: Tensor, labels: Tensor, **inputs: Any) -> tuple[float, Gradients]:
    """Loss and gradients of one forward of everything."""
    model.zero_grad(set_to_none=True)
    loss = mean_loss(model(ids, use_cache=False, **inputs).logits, labels)
    loss.backward()
    return loss.item(), taken(model)


def through_a_cache(model: nn.Module, ids: Tensor, labels: Tensor, size: int) -> tuple[float, Gradients]:
    """Chunk after chunk through a cache that keeps the whole graph: the same random numbers as chunkwise backward.

    Without the last token, which predicts nothing.
    """
    model.zero_grad(set_to_none=True)
    cache = DynamicCache()
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids[:, :-1].split(size, 1)]
    loss = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.item(), taken(model)


def chunked(model: nn.Module, ids: Tensor, labels: Tensor, size: int, **inputs: Any) -> tuple[float, Gradients]:
    """Loss and gradients by `chunkwise.backward`."""
    model.zero_grad(set_to_none=True)
    loss = chunkwise.backward(model, input_ids=ids, labels=labels, chunk_size=size, **inputs)
    assert loss.dim() == 0
    assert not loss.requires_grad
    return float(loss), taken(model)


def far(got: Gradients, want: Gradients) -> float:
    """The largest difference, relative to each parameter's largest gradient."""
    assert got.keys() == want.keys()
    return max(distance(got[n], w) / float(w.abs().max()) for n, w in want.items() if w.any())


def rounding(model: nn.Module) -> float:
    """How far the order of sums moves a gradient of this model: that of the same rows, the last one first.

    About 1e-15 in float64; 1e-7 where a family's norms sum in fp32 whatever its dtype.
    """
    ids = tokens(3)
    error = far(plain(model, ids.flip(0), ids.flip(0))[1], plain(model, ids, ids)[1])
    assert 0 < error < 1e-3
    return FACTOR * error


def rounding_of_attention(model: nn.Module, ids: Tensor, labels: Tensor, **inputs: Any) -> float:
    """How far another implementation of the same attention moves a gradient: a dense mask through our op."""
    want = plain(model, ids, labels, **inputs)[1]
    with lcpatch.patched(model, "sink", window=10**6, impl="sdpa"):
        error = far(plain(model, ids, labels, **inputs)[1], want)
    assert error < 1e-3, error
    return max(FACTOR * error, rounding(model))


def assert_same(got: tuple[float, Gradients], want: tuple[float, Gradients], allowed: float) -> None:
    """Loss and every gradient within `allowed`."""
    assert abs(got[0] - want[0]) <= allowed * abs(want[0])
    assert far(got[1], want[1]) <= allowed
