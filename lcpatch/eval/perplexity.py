"""Perplexity without a logit for every token at once: memory is one chunk x vocabulary, whatever the length.

The text goes through the decoder once. Its hidden states then go, a chunk at a time, through whatever the model itself
puts behind them: the head, a logit scale (Cohere, Granite), a final softcap (Gemma). That is done by calling the model
on a single token and handing it the chunk in place of what its decoder returned, so no family needs a case of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patching.apply import unwrap


@torch.no_grad()
def token_nll(
    model: nn.Module, input_ids: Tensor, *, attention_mask: Tensor | None = None, chunk_size: int = 256, **kwargs: Any
) -> Tensor:
    """What each next token costs: its negative log-likelihood in nats, given all before it.

    The model runs as it is, in its own mode: call `model.eval()` first if that is what you want to measure.

    Args:
        model: a causal language model, patched or not, or a PEFT model around one.
        input_ids: [B, T], T >= 2.
        attention_mask: [B, T], 1 = token and 0 = pad.
        chunk_size: tokens whose logits exist at one time.
        **kwargs: passed on to the model, such as `past_key_values` to keep the cache of the first T - 1 tokens, or
            `position_ids` [B or 1, T - 1].

    Returns:
        fp32 [B, T - 1]; NaN where a pad is predicted, or predicts.

    Raises:
        ValueError: fewer than two tokens, or a model without a language-model head.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids {list(input_ids.shape)} must be [batch, tokens] with at least two tokens")
    base = unwrap(model)
    if base.base_model is base:
        raise ValueError(f"{type(base).__name__} has no language-model head; load it with AutoModelForCausalLM")
    given, targets = input_ids[:, :-1], input_ids[:, 1:]
    mask = None if attention_mask is None else attention_mask[:, :-1]
    kwargs = {"use_cache": kwargs.get("past_key_values") is not None, **kwargs}
    hidden = _hidden(model, base, given, attention_mask=mask, **kwargs)
    nll = torch.cat(
        [
            _cross_entropy(_logits(model, base, given[:, :1], part), target)
            for part, target in zip(hidden.split(chunk_size, 1), targets.split(chunk_size, 1), strict=True)
        ],
        1,
    )
    if attention_mask is not None:
        real = attention_mask.bool()
        nll = nll.masked_fill(~(real[:, 1:] & real[:, :-1]), torch.nan)
    return nll


def perplexity(nll: Tensor) -> float:
    """exp of the mean of `token_nll`'s result; pads (NaN) do not count."""
    return float(nll.double().nanmean().exp())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # Rows of classes, not [B, V, n]: along a strided axis a CPU takes ten times as long.
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(logits.device), reduction="none")
    return flat.view(targets.shape)


def _hidden(model: nn.Module, base: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """The decoder's last hidden states [B, T, C], in a forward that makes one token's logits."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    handle = base.base_model.register_forward_hook(keep)
    try:
        model(input_ids=input_ids, logits_to_keep=1, return_dict=True, **kwargs)
    finally:
        handle.remove()
    return seen[0]


def _logits(model: nn.Module, base: Any, token: Tensor, hidden: Tensor) -> Tensor:
    """The logits [B, n, V] that the model makes of `hidden` [B, n, C], whatever `token` [B, 1] says."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    handle = base.base_model.register_forward_hook(replace)
    try:
        return model(input_ids=token, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
