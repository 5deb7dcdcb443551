"""The arms of `lcpatch bench cache`: caches of transformers, of others and of ours, and how each reads a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from ..caches.cache import LongCache
from ..caches.cluster import ClusterCache
from ..caches.h2o import H2OCache
from ..caches.retrieval import RetrievalCache
from ..caches.tiered import TieredCache
from ..hf.decode_ahead import decode_ahead
from . import peers

CHUNK = 8192
NEW_TOKENS = 32
COMPILED_TOKENS = 128
SLOW_TOKENS = 8  # half a second each: all keys and values cross the bus


def _read(model: nn.Module, ids: torch.Tensor, cache: Any) -> None:
    model(ids, past_key_values=cache, logits_to_keep=1)


@dataclass(frozen=True)
class Arm:
    """A cache, how it is made for (model, batch, most tokens), and in what chunks a prompt is read (None: at once).

    `all_rows`: every row of a batch is read, as rows of this cache are not copied. `partial`: a step reads less than
    the cache holds, so that reading all of it is no floor. `new`: tokens generated in a run (a few on a CPU, where
    times say nothing). `read`: takes a part of the prompt. `needs`: the package that brings the cache. `loop`: the
    decoding loop, `generate(custom_generate=…)`; None: transformers' own, as for all peers.
    """

    name: str
    make: Callable[[nn.Module, int, int], Any]
    chunk: int | None = None
    all_rows: bool = False
    partial: bool = False
    new: int = NEW_TOKENS
    read: Callable[[nn.Module, torch.Tensor, Any], None] = _read
    needs: str | None = None
    loop: Callable[..., torch.Tensor] | None = None


def _dynamic(model: nn.Module, *_: int) -> DynamicCache:
    return DynamicCache(config=model.config)


def _static(model: nn.Module, batch: int, most: int) -> StaticCache:
    return StaticCache(model.config, max_cache_len=most)


def _offloaded(model: nn.Module, *_: int) -> DynamicCache:
    """transformers' cache that keeps all layers but the current one in host memory; that takes a GPU."""
    return DynamicCache(config=model.config, offloading=next(model.parameters()).is_cuda)


def _of(kind: type[LongCache], *args: Any, **options: Any) -> Callable[..., LongCache]:
    """Makes a cache of ours with these options."""
    return lambda model, *_: kind(model, *args, **options)


def _whole(model: nn.Module, batch: int, most: int) -> H2OCache:
    """Nothing is evicted: the same path, uncompressed."""
    return H2OCache(model, most, compiled=True)


def _compiled(name: str, make: Callable[..., Any], **more: Any) -> Arm:
    return Arm(f"{name}, compiled", make, CHUNK, new=COMPILED_TOKENS, **more)


def _and_ahead(arm: Arm) -> tuple[Arm, Arm]:
    """The arm, and the same in our own decoding loop."""
    return arm, replace(arm, name=f"{arm.name}, decode_ahead", loop=decode_ahead)


QUEST = {"scorer": "quest"}  # of the scorers what reads most
TIERS = {"gpu_bytes": 2 << 30}  # of keys and values on the GPU: an eighth of those of 128K tokens

ARMS = (
    # transformers' own and others'
    Arm("DynamicCache", _dynamic),
    _compiled("StaticCache", _static, all_rows=True),
    Arm("DynamicCache, offloaded", _offloaded, CHUNK, partial=True, new=SLOW_TOKENS),
    Arm("QuantizedCache, hqq", peers.quantized("hqq"), all_rows=True, needs="hqq"),
    Arm("QuantizedCache, quanto", peers.quantized("optimum-quanto"), all_rows=True, needs="optimum-quanto"),
    Arm("SnapKV 0.2, kvpress", _dynamic, read=peers.pressed("SnapKVPress"), needs="kvpress"),
    Arm("Knorm 0.2, kvpress", _dynamic, read=peers.pressed("KnormPress"), needs="kvpress"),
    # ours
    Arm("H2O 0.2", _of(H2OCache, 0.2), CHUNK),
    Arm("H2O 0.2, at once", _of(H2OCache, 0.2)),
    *_and_ahead(_compiled("H2O, nothing evicted", _whole)),
    *_and_ahead(_compiled("H2O 0.2", _of(H2OCache, 0.2, compiled=True))),
    Arm("H2O 0.2, int8", _of(H2OCache, 0.2, codec="int8"), CHUNK),
    Arm("Cluster 0.2", _of(ClusterCache, 0.2), CHUNK),
    *_and_ahead(_compiled("Cluster 0.2", _of(ClusterCache, 0.2, compiled=True))),
    Arm("Retrieval 4K", _of(RetrievalCache, 4096, **QUEST), CHUNK, partial=True),
    *_and_ahead(_compiled("Retrieval 4K", _of(RetrievalCache, 4096, **QUEST, compiled=True), partial=True)),
    Arm("Tiered, 2 GB", _of(TieredCache, **TIERS), CHUNK, partial=True),
    _compiled("Tiered, 2 GB", _of(TieredCache, **TIERS, compiled=True), partial=True),
)
"""In the order of a result's rows."""
