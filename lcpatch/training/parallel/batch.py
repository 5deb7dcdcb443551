"""From a whole batch, the same on every rank, to the part of it that a rank trains on.

Labels are shifted over the whole row before it is cut: the target of a shard's last token is the next shard's first. A
rank's loss is the sum over its own targets divided by all ranks' targets, so the ranks' losses, and their gradients,
add up to those of one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.errors import ParallelError
from ...hf.attention import SHARD
from .layout import Documents, Shard, make_layout

IGNORE = -100
KNOWN = ("input_ids", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def shard_batch(
    batch: Mapping[str, Any],
    rank: int,
    num_ranks: int,
    layout: str = "contiguous",
    num_items: int | Tensor | None = None,
    data_ranks: int = 1,
    members: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """The arguments of a parallelized model's forward on `rank`.

    Args:
        batch: the whole batch, as a collator makes it: `input_ids` [B, N]; `labels` [B, N], not shifted (-100: no
            target); a 2-D `attention_mask` of padding on either side; `position_ids` [B, N] that restart, or
            `cu_seq_lens_q`, where rows are packed. Other entries are passed on if they are not tensors.
        rank, num_ranks: of those that share the batch.
        layout: which rank gets which tokens: "contiguous" (for patterns), "head_tail" or "per_document".
        num_items: targets by which the loss is divided; default: those of this batch. For gradient accumulation, and
            for data parallelism around it, the number over all of a step's batches.
        members: which ranks of the group share it; None: all.
        data_ranks: factor of the loss, for a host that averages gradients over ranks which should add up (DDP, FSDP).

    Raises:
        ParallelError: no tokens, fewer tokens than ranks, or a tensor that cannot be cut.
    """
    ids = ids_of(batch, num_ranks)
    length = ids.shape[1]
    if unknown := [k for k, v in batch.items() if k not in KNOWN and isinstance(v, Tensor)]:
        raise ParallelError(f"{unknown[0]} cannot be cut over ranks; known tensors: {', '.join(KNOWN)}")
    documents = documents_of(batch)
    cut = make_layout(layout, length, num_ranks, documents)
    if not all(cut.runs):  # transformers' models fail on no tokens, and would on that rank alone
        raise ParallelError(
            f"layout={layout!r} leaves some of {num_ranks} ranks without any token of documents this short; use "
            "layout='contiguous', or fewer ranks"
        )
    shard = Shard(cut, documents, rank, members)
    places = cut.tokens(rank).to(ids.device)
    result: dict[str, Any] = {k: v for k, v in batch.items() if k not in KNOWN}
    result |= {"input_ids": ids[:, places], "position_ids": _positions(documents, length).to(ids.device)[:, places]}
    if batch.get("labels") is not None:
        targets = shifted(batch["labels"], documents)
        total = max(1, int((targets != IGNORE).sum())) if num_items is None else num_items
        mine = targets[:, places].contiguous()
        # transformers' loss takes `shift_labels` as they are; `labels` only tells the model to compute one.
        result |= {"labels": mine, "shift_labels": mine, "num_items_in_batch": total / data_ranks}
    return {**result, "use_cache": False, SHARD: shard}


def ids_of(batch: Mapping[str, Any], num_ranks: int) -> Tensor:
    """`input_ids` [B, N].

    Raises:
        ParallelError: no tokens, or fewer than ranks.
    """
    ids = batch["input_ids"]
    if ids.dim() != 2 or not ids.numel():
        raise ParallelError(f"input_ids must be [rows, tokens] with at least one of each; got {list(ids.shape)}")
    if ids.shape[1] < num_ranks:
        raise ParallelError(
            f"rows of {ids.shape[1]} tokens leave some of {num_ranks} ranks without any; use fewer ranks"
        )
    return ids


def documents_of(batch: Mapping[str, Any]) -> Documents:
    """The documents of each row, from padding mask, restarting positions or `cu_seq_lens_q`.

    Raises:
        ParallelError: pads between real tokens, or a mask that is not 2-D.
    """
    rows, length = batch["input_ids"].shape
    mask, positions, offsets = (batch.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if offsets is not None and rows == 1:
        edges = offsets.tolist()
        return (tuple((a, b) for a, b in pairwise(edges) if a < b),)
    if mask is not None and mask.dim() != 2:
        raise ParallelError(f"attention_mask must be [rows, tokens], 1 for tokens, 0 for pads; got {list(mask.shape)}")
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask.bool().cpu()
    found = []
    for b in range(rows):
        places = real[b].nonzero()[:, 0]
        start, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if end - start != len(places):
            raise ParallelError(f"row {b} of attention_mask has padding between real tokens; pad on the left or right")
        edges = [start]
        if positions is not None:
            row = positions.expand(rows, -1)[b, start:end].cpu()
            edges += ((row[1:] <= row[:-1]).nonzero()[:, 0] + start + 1).tolist()
        edges.append(end)
        found.append(tuple((x, y) for x, y in pairwise(edges) if x < y))
    return tuple(found)


def shifted(labels: Tensor, documents: Documents) -> Tensor:
    """Each token's target: the next token's label; none for a document's last token and for pads."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = torch.zeros_like(targets, dtype=torch.bool)
    for b, row in enumerate(documents):
        for start, end in row:
            keep[b, start : end - 1] = True
    return targets.masked_fill(~keep, IGNORE)


def _positions(documents: Documents, length: int) -> Tensor:
    """Positions counted from each document's start, [B, N]; pads have 0."""
    result = torch.zeros(len(documents), length, dtype=torch.int64)
    for b, row in enumerate(documents):
        for start, end in row:
            result[b, start:end] = torch.arange(end - start)
    return result
