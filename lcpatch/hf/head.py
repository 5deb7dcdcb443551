"""A causal language model in its two parts: its decoder in one piece, and all that it puts behind it for a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModelError


def decoder_of(base: Any) -> nn.Module:
    """The part of a transformers model that ends in hidden states, as the model calls it: OPT's is inside its base.

    The model itself, if it has no head. transformers' `get_decoder` is none to ask: it takes whatever is called
    `decoder`, which in ModernBERT's is the matrix of the logits, and gives Llama 4's back with its head.
    """
    inner = base.base_model
    if inner is base:  # Llama 4's prefix is of the model with its vision, and names nothing in the text's alone
        inner = getattr(base, "model", base)
    return getattr(inner, "decoder", inner)


def decode(model: nn.Module, decoder: nn.Module, **inputs: Any) -> tuple[Any, Tensor]:
    """What the decoder returns inside `model(**inputs)`, and its hidden states [B, T, C]; the head sees one token.

    Args:
        model: a causal language model, or a wrapper around one.
        decoder: the part of it that ends in hidden states.
        **inputs: as the model takes them.

    Raises:
        UnsupportedModelError: the model does not call its decoder.
    """
    seen: list[Any] = []

    def shorten(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output)
        return _with_hidden(output, output.last_hidden_state[:, :1])

    handle = decoder.register_forward_hook(shorten)
    try:
        model(**inputs, return_dict=True)
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call its {type(decoder).__name__}, so its loss cannot be computed a few "
            "rows at a time; use a model whose forward is its decoder and a head"
        )
    return seen[0], seen[0].last_hidden_state


@contextmanager
def head_of(model: nn.Module, decoder: nn.Module, output: Any, token: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model as its own head: hidden states [1, n, C] to logits [1, n, V], with its softcap, scale or LoRA.

    For a while the decoder returns, whatever it is given, `output` with other hidden states.

    Args:
        model, decoder: as above.
        output: what the decoder returned.
        token: any token [1, 1], to call the model with.
    """
    rows: list[Tensor] = []
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: _with_hidden(output, rows[-1])

    def head(hidden: Tensor) -> Tensor:
        rows[:] = [hidden]
        return model(input_ids=token, use_cache=False, return_dict=True).logits

    try:
        yield head
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def trained_by(head: Callable[[Tensor], Tensor], hidden: Tensor) -> list[Tensor]:
    """The leaves that a head's logits hand a gradient to, wherever in the model they lie; none where there are none.

    Their modules do not tell: PEFT's trainable tokens lie in the embeddings, and change a head that is tied to them.
    """
    if not torch.is_grad_enabled():
        return []
    todo, seen = [head(hidden[:1, :1].detach()).grad_fn], {None}
    found: list[Tensor] = []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):  # the end of a path: what accumulates a gradient
            found.append(node.variable)
    return found


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return type(output)(**{**output, "last_hidden_state": hidden})
