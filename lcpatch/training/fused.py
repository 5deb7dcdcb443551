"""A model's loss without the logits of a whole row: its decoder in one piece, its head on a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hf.models import unwrap
from .chunkwise import _headed, _with_hidden
from .loss import IGNORE, summed_cross_entropy
from .support import without_wrapper


def can_fuse(model: nn.Module) -> bool:
    """Whether the loss is the cross-entropy alone: not so where a router's balance is part of it."""
    return not getattr(unwrap(model).config, "output_router_logits", False)


def fused_loss(model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
    """What `model(**inputs).loss` is, differentiable.

    Args:
        model: a causal language model, or a wrapper of PEFT or DistributedDataParallel around one.
        inputs: `input_ids` and `labels` [B, T], not shifted, and what else the model takes.
        num_items: what the summed loss is divided by; None: the labels that count.
    """
    inner = without_wrapper(model)
    base = unwrap(inner)
    decoder = base.base_model
    given = {name: value for name, value in inputs.items() if name != "labels"}
    seen: list[tuple[Any, Tensor]] = []

    def shorten(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append((output, output.last_hidden_state))
        return _with_hidden(output, output.last_hidden_state[:, :1])

    handle = decoder.register_forward_hook(shorten)
    try:
        model(**given, return_dict=True)
    finally:
        handle.remove()
    output, hidden = seen[0]
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
    behind = [module for module in base.children() if module is not decoder]
    parameters = list({id(p): p for module in behind for p in module.parameters()}.values())
    token = inputs["input_ids"][:1, :1]
    with _headed(decoder, output) as replace:

        def head(rows: Tensor) -> Tensor:
            replace(rows)
            return inner(input_ids=token, use_cache=False, return_dict=True).logits

        total = summed_cross_entropy(head, hidden, targets, parameters, base.config.vocab_size)
    return total / ((targets != IGNORE).sum() if num_items is None else num_items)
