"""Dense attention of a chunk over all tokens before it and over itself, by a kernel that knows no such shape.

cuDNN's causal mask starts at the first key, so it cannot run a chunk against its prefix in one call. But softmax can be
split: the prefix is cut into pieces that no mask cuts, the chunk itself is plain causal attention, and the results are
merged by their LSEs. Backward runs each part with the merged output and LSE, from which its probabilities are those of
the whole row, so gradients add up: ring attention, in time.

A piece is a power of two of chunks long, at most `MOST`, and contiguous: cuDNN makes a plan for each shape and stride,
and so it sees four of them whatever the length; and what a piece takes beside the buffers (its copy, its gradients,
cuDNN's own space) does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcpatch_kernels import DENSE

from ..hf.watch import Call
from .buffers import Now, Store, Unit, exact_gradients

aten = torch.ops.aten
MOST = 8
"""Chunks in a piece: 4,096 queries against 32,768 keys keep a GPU busy."""


class Part(NamedTuple):
    """A call's queries against some keys: all of them, or causally against as many as there are queries."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float | None


def fits(call: Call) -> bool:
    """Whether a call is nothing but dense causal attention that cuDNN computes."""
    if set(call.spec.rules) != {DENSE} or call.bounds is not None or call.softcap:
        return False
    query = call.query
    half = query.dtype in (torch.float16, torch.bfloat16)
    return not query.is_cuda or (half and query.shape[3] <= 128 and query.shape[3] % 8 == 0)


def pieces(start: int, size: int) -> Iterator[slice]:
    """The tokens before `start` in pieces of `size` times a power of two up to `MOST`, longest first."""
    begin = 0
    while begin < start:
        length = min(size << ((start - begin) // size).bit_length() - 1, MOST * size)
        yield slice(begin, begin + length)
        begin += length


class AttendInPieces(torch.autograd.Function):
    """As `buffers.Attend`, in dense parts."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, call: Call, store: Store, unit: Unit, now: Now
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        key, value = store.read(unit, now)
        own = run(Part(query, keys.contiguous(), values.contiguous(), True, call.scale))
        out, lse = own.out.to(own.lse.dtype), own.lse
        for piece in pieces(now.start, now.size):
            more = run(Part(query, *_contiguous(key, value, piece), False, call.scale))
            both = torch.logaddexp(lse, more.lse)
            out.mul_((lse - both).exp()[..., None]).addcmul_(more.out.to(out.dtype), (more.lse - both).exp()[..., None])
            lse = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, keys, values, out, lse)
        ctx.where = (own.state, call.scale, store, unit, now)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        state, scale, store, unit, now = ctx.where
        query, keys, values, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        with exact_gradients(query.device.type):
            own = Part(query, keys.contiguous(), values.contiguous(), True, scale)
            first, *own_grads = run_backward(own, grad_out, grad_lse, out, lse, state)
            grad_query = first.to(lse.dtype)
            key, value = store.read(unit, now)
            for piece in pieces(now.start, now.size):
                part = Part(query, *_contiguous(key, value, piece), False, scale)
                more, *grads = run_backward(part, grad_out, grad_lse, out, lse, state)
                grad_query += more
                store.add(unit, tuple(grads), piece.start, piece.stop)
            return grad_query.to(query.dtype), *store.take(unit, tuple(own_grads), now), None, None, None, None


class Result(NamedTuple):
    """`out` [B, H, T, D] and `lse` [B, H, T] of a part; `state`: what else cuDNN wants back in its backward."""

    out: Tensor
    lse: Tensor
    state: tuple[Any, ...] = ()


def run(part: Part) -> Result:
    """By cuDNN on a GPU, in plain torch elsewhere."""
    query, key, value, causal, scale = part
    if query.is_cuda:
        out, lse, cum_q, cum_k, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return Result(out, lse.reshape(query.shape[:3]), (lse.shape, seed, offset, cum_q, cum_k))
    scores = _scores(part)
    lse = scores.logsumexp(-1)
    return Result(((scores - lse[..., None]).exp() @ _repeated(part, value)).to(query.dtype), lse)


def run_backward(
    part: Part, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, state: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part's queries, keys and values; `out`, `lse` and their gradients are of the whole rows."""
    query, key, value, causal, scale = part
    if query.is_cuda:
        if grad_lse is not None:
            raise ValueError("attention='cudnn' has no gradient of the LSE, which sink logits need; use 'lcpatch'")
        shape, seed, offset, cum_q, cum_k = state
        rest = (seed, offset, None, cum_q, cum_k, query.shape[2], key.shape[2], 0.0, causal)
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse.reshape(shape), *rest, scale=scale
        )
    probabilities = (_scores(part) - lse[..., None]).exp()
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_out = grad_out.to(lse.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    grad_scores = probabilities * (grad_out @ _repeated(part, value).mT - delta[..., None]) * factor
    grads = grad_scores @ _repeated(part, key), grad_scores.mT @ query.to(lse.dtype), probabilities.mT @ grad_out
    folded = (x if x is grads[0] else x.unflatten(1, (key.shape[1], -1)).sum(2) for x in grads)
    grad_query, grad_key, grad_value = (x.to(query.dtype) for x in folded)
    return grad_query, grad_key, grad_value


def _scores(part: Part) -> Tensor:
    query, key, _, causal, scale = part
    scores = query.to(_wide(query)) @ _repeated(part, key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    return scores


def _repeated(part: Part, x: Tensor) -> Tensor:
    return x.to(_wide(x)).repeat_interleave(part.query.shape[1] // x.shape[1], 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(key: Tensor, value: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    return key[:, :, piece].contiguous(), value[:, :, piece].contiguous()
