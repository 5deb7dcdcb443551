"""What is trained on, checked and cut: labels shifted before chunks are made, nothing after the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .loss import IGNORE
from .packing import documents

FLASH_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What transformers' flattening collator also says of packed documents; restarting positions say it all."""


@dataclass(frozen=True)
class Text:
    """A batch, up to the last token that predicts a label.

    Args:
        ids: [B, T].
        targets: [B, T], each token's next one, or -100; on the host, where chunks can ask which rows count.
        mask: [B, T], 1 = token and 0 = pad; None: no pads.
        positions: [1 or B, T], or None for the model's own.
        documents: [B, T], which packed document a token belongs to; None: one a row.
        denominator: what the summed loss is divided by, 0-dim.
        shards: where this is one rank's part of a text (see `parallel.chunks`): its chunks, and what the model is told
            of each.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor | None
    positions: Tensor | None
    documents: Tensor | None
    denominator: Tensor
    shards: Mapping[tuple[int, int], Any] = field(default_factory=dict)

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """The (start, end) of each chunk; the last may be shorter."""
        if self.shards:
            return list(self.shards)
        length = self.ids.shape[1]
        return [(start, min(start + size, length)) for start in range(0, length, size)]


def make_text(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    chunk_size: int,
    isolates: bool,
) -> Text:
    """Check a batch and cut off what follows its last label: nothing there has a gradient.

    A batch without any label keeps its first chunk, so that a process of several still takes part; its loss is 0.
    `isolates`: whether the model keeps packed documents apart beside a mask too.

    Raises:
        ValueError: shapes that do not fit, or no label and no `num_items_in_batch` to divide by.
    """
    _check(input_ids, labels, attention_mask, position_ids, chunk_size)
    if isinstance(num_items_in_batch, int) and num_items_in_batch < 1:  # a tensor's number would be waited for
        raise ValueError(f"num_items_in_batch={num_items_in_batch}, which divides the loss, must be at least 1")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    valid = targets != IGNORE
    if num_items_in_batch is None:
        if not bool(valid.any()):
            raise ValueError(
                "labels: none of the tokens predicts a label (all are -100, or follow the last token), so the mean "
                "loss is 0 / 0; leave such a batch out, or pass num_items_in_batch, the labels of the whole batch"
            )
        num_items_in_batch = valid.sum()
    columns = valid.any(0)
    end = len(columns) - int(columns.flip(0).int().argmax()) if bool(columns.any()) else min(chunk_size, len(columns))
    mask = None if attention_mask is None else attention_mask[:, :end]
    positions = None if position_ids is None else position_ids[:, :end]
    numbers = documents(positions, mask, len(input_ids))
    if numbers is not None and mask is not None and not isolates:
        raise ValueError(
            "position_ids restart beside an attention_mask: transformers then lets packed documents see each other; "
            "leave the mask out, or patch the model with lcpatch.apply"
        )
    if mask is not None and bool(mask.all()):
        mask = None
    return Text(
        input_ids[:, :end],
        targets[:, :end].cpu(),
        mask,
        positions,
        numbers,
        torch.as_tensor(num_items_in_batch, device=input_ids.device),
    )


def check_kwargs(kwargs: Mapping[str, Any], length: int, position_ids: Tensor | None) -> dict[str, Any]:
    """What goes on to the model: nothing that holds something per token, which would have to be cut too.

    Raises:
        ValueError: an argument that cannot be passed on to every chunk.
    """
    passed = {}
    for name, value in kwargs.items():
        if name in FLASH_NAMES:
            if position_ids is None and value is not None:
                raise ValueError(f"{name} needs position_ids that restart in each document; pass those too")
            continue
        if name in ("past_key_values", "use_cache", "logits_to_keep", "inputs_embeds", "shift_labels", "return_dict"):
            raise ValueError(f"{name} is not for chunkwise backward, which makes its own cache from input_ids")
        if name == "output_router_logits" and value:
            raise ValueError(f"{name}: the routers' auxiliary loss is not a sum over tokens; leave it out")
        if isinstance(value, Tensor) and length in value.shape:
            raise ValueError(f"{name} {list(value.shape)} holds something per token, which is not cut into chunks")
        passed[name] = value
    return passed


def _check(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, chunk_size: int
) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids {list(input_ids.shape)} must be [batch, tokens], with at least one token")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids, {list(input_ids.shape)}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be a whole number of tokens, at least 1")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must be [batch, tokens] like input_ids "
            f"{list(input_ids.shape)}, 1 = token and 0 = pad"
        )
    if position_ids is not None and (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, len(input_ids))
        or position_ids.shape[1] != input_ids.shape[1]
    ):
        raise ValueError(f"position_ids {list(position_ids.shape)} must be [1 or batch, tokens] like input_ids")
