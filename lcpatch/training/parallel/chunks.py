"""A text in chunks whose every chunk is shared by all ranks: what one rank runs of it.

Chunks are cut from the whole text, and each over the ranks. So a rank's own keys, values and their gradients are those
of its share of the text (2 kappa / P bytes a token of the whole), and every rank has as much before a chunk as any
other. Dense attention sends the chunk's queries to where the keys are (`tokenring`): what travels does not grow with
what was before. A pattern's rows are brought what they see (`halo`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from ...core.errors import ParallelError
from ..packing import PAD
from ..text import Text
from .batch import documents_of
from .layout import Documents, Run, Shard, chunked


class Ranks(Protocol):
    """What is asked of a `Parallel`."""

    rank: int
    size: int


def share(text: Text, ranks: Ranks, chunk_size: int) -> Text:
    """This rank's part of every chunk, one behind the other, as a text of its own whose chunks know the whole.

    Targets, positions and the denominator are the whole text's. A last chunk of fewer tokens than ranks joins the one
    before it.

    Args:
        text: the whole one, the same on every rank.
        ranks: the parallelized model's.
        chunk_size: tokens of a chunk, over all ranks.

    Raises:
        ParallelError: fewer tokens than ranks, in a chunk or in the text, or padding between tokens.
    """
    length = text.ids.shape[1]
    for what, tokens in ((f"chunk_size={chunk_size}", chunk_size), (f"a text of {length} tokens", length)):
        if tokens < ranks.size:
            raise ParallelError(f"{what} leaves some of {ranks.size} ranks without any token; use fewer ranks")
    chunks = text.chunks(chunk_size)
    if length - chunks[-1][0] < ranks.size:
        chunks[-2:] = [(chunks[-2][0], length)]
    documents = _documents(text)
    shards: dict[Run, Any] = {}
    for n, (_, end) in enumerate(chunks):
        layout = chunked(chunks[: n + 1], ranks.size)
        span = layout.num_before(ranks.rank), layout.num_tokens(ranks.rank)
        shards[span] = Shard(layout, _until(documents, end), ranks.rank)
    here = layout.tokens(ranks.rank)
    places = here.to(text.ids.device)
    return replace(
        text,
        ids=text.ids[:, places],
        targets=text.targets[:, here],
        mask=None,
        positions=places[None] if text.positions is None else text.positions[:, places],
        documents=None,
        shards=shards,
    )


def _documents(text: Text) -> Documents:
    """The documents of each row, from what the text says of padding and packing."""
    rows = documents_of({"input_ids": text.ids, "attention_mask": text.mask})
    if text.documents is None:
        return rows
    return tuple(_stretches(numbers) for numbers in text.documents.cpu())


def _stretches(numbers: Tensor) -> tuple[Run, ...]:
    edges = [0, *((numbers[1:] != numbers[:-1]).nonzero()[:, 0] + 1).tolist(), len(numbers)]
    return tuple((start, end) for start, end in pairwise(edges) if numbers[start] != PAD)


def _until(documents: Documents, end: int) -> Documents:
    return tuple(tuple((a, min(b, end)) for a, b in row if a < end) for row in documents)
