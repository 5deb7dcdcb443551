"""Learnable sinks: what every query of a patched layer attends to beside tokens, whatever its pattern, kernel or cache.

A sink logit is a key that has a score and no value, one for each query head. A prefix sink is a learned key and value
of each KV head, in front of the text. Neither is ever in the sequence: attention over sinks is computed apart and
merged with the (out, LSE) of the tokens, which is exact and differentiable whatever computed them. So positions, masks,
bounds, cached tokens and the budgets of caches are those of a model without sinks.

Source: the learnable sink token of StreamingLLM, arXiv 2309.17453, section 3.3. Its form here, a key k' and a value v'
for each head, is the explicit attention bias of "Massive Activations in Large Language Models", arXiv 2402.17762,
section 4.3, and prefix tuning's, arXiv 2101.00190. Departures: StreamingLLM's is one input embedding, in a model that
was trained with it from the start; it would change all that an existing model computes. Ours belongs to a layer, n at a
time, and its score has a learnable logit for each query head, so low at the start that the model is nearly as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import parse_sinks
from .layers import head_dim_of, shape_of
from .models import weights_of
from .state import SINK_KEY, SINK_LOGIT, SINK_VALUE

NAMES = (SINK_LOGIT, SINK_KEY, SINK_VALUE)
KEY_STD = 0.1
"""Of a prefix sink's first keys. Equal keys would get equal gradients and stay one key; a score begins this times
|q| / sqrt(D) around its logit."""


def is_sink(name: str) -> bool:
    """Whether a model's parameter of that name is a learnable sink's."""
    return name.rpartition(".")[2] in NAMES


def sinks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable sinks of an attention module."""
    return {name: module._parameters[name] for name in NAMES if name in module._parameters}


def give_sinks(module: nn.Module, sinks: Mapping[str, nn.Parameter]) -> None:
    """Let a module have these sinks, and no others."""
    for name in NAMES:
        module._parameters.pop(name, None)
    for name, parameter in sinks.items():
        module.register_parameter(name, parameter)


def sink_parameters(modules: Mapping[int, nn.Module]) -> dict[str, nn.Parameter]:
    """The sinks of attention modules, under the names that files give them, such as "layers.0.sink_logit"."""
    return {
        f"layers.{index}.{name.removeprefix('lcpatch_')}": parameter
        for index, module in modules.items()
        for name, parameter in sinks_of(module).items()
    }


def make_sinks(module: nn.Module, setting: str | None) -> dict[str, nn.Parameter]:
    """The sinks that a patch's `sinks` asks of an attention module, untrained; the same in every process.

    fp32 whatever the model is: a start is far from the values that matter, and bf16 steps there are 1/16 wide.

    Returns:
        `SINK_LOGIT` [H]; or, of n prefix sinks, `SINK_LOGIT` [H, n], `SINK_KEY` and `SINK_VALUE` [K, n, D].
    """
    sinks = parse_sinks(setting)
    if sinks is None or not sinks.learnable:
        return {}
    shape, device = shape_of(module.config, 0, 1, module.layer_idx), next(weights_of(module)).device
    if sinks.kind == "logit":
        return {
            SINK_LOGIT: nn.Parameter(torch.full((shape.num_heads,), sinks.start, dtype=torch.float32, device=device))
        }
    rng = torch.Generator().manual_seed(module.layer_idx)
    keys = torch.randn(shape.num_kv_heads, sinks.count, head_dim_of(module), generator=rng, dtype=torch.float32)
    tensors = {
        SINK_LOGIT: torch.full((shape.num_heads, sinks.count), sinks.start, dtype=torch.float32),
        SINK_KEY: keys * KEY_STD,
        SINK_VALUE: torch.zeros_like(keys),
    }
    return {name: nn.Parameter(tensor.to(device)) for name, tensor in tensors.items()}


def sink_scores(
    module: nn.Module, query: Tensor, scale: float | None, softcap: float | None, s_aux: Tensor | None = None
) -> Tensor | None:
    """The scores [B, H, T, n] of a layer's sinks, at least in fp32; None if it has none.

    Args:
        query: [B, H, T, D], rotated. A prefix sink's key is not, so to the queries it stands at position 0 of each
            document, with the first token, also where `SinkCache` moves the tokens that it keeps.
        scale, softcap: of the layer's scores; a sink's logit is added after them.
        s_aux: [H], sink logits that are the model's own.
    """
    logit = getattr(module, SINK_LOGIT, s_aux)
    if logit is None:
        return None
    wide, key = torch.promote_types(query.dtype, torch.float32), getattr(module, SINK_KEY, None)
    if key is None:
        return logit.to(wide)[:, None, None].expand(*query.shape[:3], 1)
    (num_kv_heads, _, head_dim), (_, num_heads, _, dim) = key.shape, query.shape
    if dim != head_dim or num_heads % num_kv_heads or num_heads != len(logit):
        raise ValueError(
            f"layer {module.layer_idx}: its prefix sinks are for {len(logit)} query heads over {num_kv_heads} KV heads "
            f"of size {head_dim}, but it has {num_heads} query heads of size {dim}: sinks='prefix' cannot serve this "
            "model; take sinks='logit'"
        )
    scores = _Products.apply(query, key.to(wide)) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    return scores + logit.to(wide)[:, None]


class _Products(torch.autograd.Function):
    """q k [B, H, T, n] in the keys' dtype, fp32, as a kernel's sums are, also under autocast.

    The backward casts half-precision queries again: the fp32 copy would be the largest thing that a layer keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        with torch.autocast(query.device.type, enabled=False):
            return (_by_kv_head(query.to(key.dtype), key) @ key[:, None].mT).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            grad = _by_kv_head(grad, key)
            grad_query = (grad @ key[:, None]).flatten(1, 2).to(query.dtype)
            grad_key = (grad.mT @ _by_kv_head(query.to(key.dtype), key)).sum((0, 2))
        return grad_query, grad_key


def _by_kv_head(x: Tensor, sink: Tensor) -> Tensor:
    """[B, H, T, …] as [B, K, H / K, T, …]."""
    return x.unflatten(1, (len(sink), -1))


def merge_sinks(module: nn.Module, out: Tensor, lse: Tensor, scores: Tensor | None) -> Tensor:
    """Attention over a layer's tokens and its sinks, from that over the tokens: out [B, H, T, D], lse [B, H, T].

    One softmax over all tokens as one, and each sink: out' = (exp(lse) out + sum_j exp(s_j) v_j) / (exp(lse) +
    sum_j exp(s_j)).
    """
    if scores is None:
        return out
    value = getattr(module, SINK_VALUE, None)
    if value is None:
        return add_sink_logit(out, lse, scores[..., 0])
    with torch.autocast(out.device.type, enabled=False):
        shares = torch.cat([lse[..., None], scores.to(lse.dtype)], -1).softmax(-1)
        taken = _by_kv_head(shares[..., 1:], value) @ value.to(lse.dtype)[:, None]
        return (out * shares[..., :1] + taken.flatten(1, 2)).to(out.dtype)


def add_sink_logit(out: Tensor, lse: Tensor, logit: Tensor) -> Tensor:
    """Give every row one more key, with score `logit` [B, H, T] and value zero: out [B, H, T, D] shrinks by its share.

    Exact, and differentiable in all three, whatever computed `out` and `lse` [B, H, T]:
    out' = out * exp(lse) / (exp(lse) + exp(logit)).
    """
    return (out * torch.sigmoid(lse - logit.to(lse.dtype))[..., None]).to(out.dtype)
