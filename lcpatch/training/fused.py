"""A model's loss without the logits of a whole row: its decoder in one piece, its head on a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hf.head import decode, decoder_of, head_of, trained_by
from ..hf.models import unwrap
from .loss import IGNORE, summed_cross_entropy
from .support import own_loss, without_wrapper


def can_fuse(model: nn.Module) -> bool:
    """Whether the loss is the cross-entropy alone: not another one, nor with a router's balance in it."""
    return not getattr(unwrap(model).config, "output_router_logits", False) and not own_loss(model)


def fused_loss(model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
    """What `model(**inputs).loss` is, differentiable.

    Args:
        model: a causal language model, or a wrapper of PEFT or DistributedDataParallel around one.
        inputs: `input_ids` and `labels` [B, T], not shifted, and what else the model takes; or `shift_labels` beside
            them, which are.
        num_items: what the summed loss is divided by; None: the labels that count.
    """
    inner = without_wrapper(model)
    base = unwrap(inner)
    decoder = decoder_of(base)
    given = {name: value for name, value in inputs.items() if name != "labels"}
    output, hidden = decode(model, decoder, **given)
    targets = inputs.get("shift_labels")
    if targets is None:
        targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
    with head_of(inner, decoder, output, inputs["input_ids"][:1, :1]) as head:
        total = summed_cross_entropy(head, hidden, targets, trained_by(head, hidden), base.config.vocab_size)
    return total / ((targets != IGNORE).sum() if num_items is None else num_items)
