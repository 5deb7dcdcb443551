"""The ways in which users feed a model: padded, packed, chunked, decoded. Each returns the logits of every document.

A schedule is `f(model, documents) -> [logits [len, V] of each document]`. `plain` defines what all of them must return.
"""

from collections.abc import Callable
from typing import Any

import torch
from models import TOKENS, tokens
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

LENGTHS = (TOKENS, 41, 17)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, seed=n)[0] for n in lengths]


def plain(model: nn.Module, document: Tensor) -> Tensor:
    """The definition: one row, no padding, no cache."""
    return model(document[None], use_cache=False).logits[0]


def pad(docs: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """`(ids, attention_mask)` [B, T]. Pads are token 5, which a mask that leaks would see."""
    longest = max(map(len, docs))
    ids, mask = torch.full((len(docs), longest), 5), torch.zeros(len(docs), longest, dtype=torch.long)
    for row, doc in enumerate(docs):
        place = slice(0, len(doc)) if side == "right" else slice(longest - len(doc), longest)
        ids[row, place], mask[row, place] = doc, 1
    return ids, mask


def unpad(logits: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def right_padded(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    ids, mask = pad(docs, "right")
    return unpad(model(ids, attention_mask=mask, use_cache=False).logits, mask)


def left_padded(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    ids, mask = pad(docs, "left")
    return unpad(model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits, mask)


def left_padded_ones(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    """The positions that `generate` used to make: 1 on every pad."""
    ids, mask = pad(docs, "left")
    positions = positions_of(mask).masked_fill(mask == 0, 1)
    return unpad(model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits, mask)


def pack(docs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(docs)[None], torch.cat([torch.arange(len(d)) for d in docs])[None]


def _unpack(logits: Tensor, docs: list[Tensor]) -> list[Tensor]:
    return list(logits[0].split([len(d) for d in docs]))


def packed(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    """With the default `use_cache=True`, where transformers makes no mask of documents."""
    ids, positions = pack(docs)
    return _unpack(model(ids, position_ids=positions).logits, docs)


def packed_no_cache(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    ids, positions = pack(docs)
    return _unpack(model(ids, position_ids=positions, use_cache=False).logits, docs)


def collate(docs: list[Tensor]) -> dict[str, Tensor]:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": d.tolist()} for d in docs])
    return {k: v for k, v in batch.items() if k != "labels"}


def flattened(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    """What the collator gives: restarting positions and `cu_seq_lens`."""
    return _unpack(model(**collate(docs)).logits, docs)


def flattened_no_cache(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    return _unpack(model(**collate(docs), use_cache=False).logits, docs)


def packed_rows(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    """Two rows: the first packs the second and third document and right pads, the second holds the first document."""
    first, second, third = docs
    row = torch.cat([second, third])
    ids, mask = pad([row, first], "right")
    positions = positions_of(mask)
    positions[0, len(second) : len(row)] = torch.arange(len(third))
    logits, other = unpad(model(ids, attention_mask=mask, position_ids=positions).logits, mask)
    return [other, *logits.split([len(second), len(third)])]


def chunked(model: nn.Module, docs: list[Tensor], size: int = 13) -> list[Tensor]:
    """Chunked prefill: 1 < q_len < kv_len."""
    result = []
    for doc in docs:
        cache = DynamicCache(config=model.config)
        parts = [model(c[None], past_key_values=cache).logits[0] for c in doc.split(size)]
        result.append(torch.cat(parts))
    return result


def decoded(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    return chunked(model, docs, size=1)


def static(model: nn.Module, docs: list[Tensor], size: int = 1) -> list[Tensor]:
    """A prefill, then tokens (or chunks of `size`), in a static cache that is longer than the text."""
    result = []
    for doc in docs:
        cache = StaticCache(config=model.config, max_cache_len=TOKENS + 9)
        parts = [model(c[None], past_key_values=cache).logits[0] for c in (doc[:11], *doc[11:].split(size))]
        result.append(torch.cat(parts))
    return result


def static_chunked(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    return static(model, docs, size=7)


def _left_padded_cached(model: nn.Module, docs: list[Tensor], cache: Any, sizes: list[int]) -> list[Tensor]:
    ids, mask = pad(docs, "left")
    positions, parts, seen = positions_of(mask), [], 0
    for size in sizes:
        now = slice(seen, seen + size)
        seen += size
        out = model(ids[:, now], attention_mask=mask[:, :seen], position_ids=positions[:, now], past_key_values=cache)
        parts.append(out.logits)
    return unpad(torch.cat(parts, 1), mask)


def left_padded_decoded(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    """The first chunk is all pads in one row, then chunks, then single tokens."""
    sizes = [20, 30, *[1] * (TOKENS - 50)]
    return _left_padded_cached(model, docs, DynamicCache(config=model.config), sizes)


def left_padded_static(model: nn.Module, docs: list[Tensor]) -> list[Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 9)
    return _left_padded_cached(model, docs, cache, [60, *[1] * (TOKENS - 60)])


WHOLE: list[Callable] = [
    right_padded,
    left_padded,
    left_padded_ones,
    packed,
    packed_no_cache,
    flattened,
    flattened_no_cache,
    packed_rows,
]
"""Schedules that see each document at once."""
GROWING: list[Callable] = [chunked, decoded, static, static_chunked, left_padded_decoded, left_padded_static]
"""Schedules in which a document grows."""
