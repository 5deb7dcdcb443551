"""One arm of `lcpatch bench cache` at one length and batch: the prompt is read, then tokens are generated.

Rows of a batch beyond the first are copies of the first, made after the prefill: decoding costs the same whatever they
say.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..caches.cache import LongCache
from ..caches.held import bytes_held
from ..patching import remove
from . import peers
from .cache_arms import Arm
from .clock import Clock, TooSlow


@dataclass(frozen=True)
class Row:
    """One arm at one length and batch.

    Args:
        prefill_s: seconds to read one row's prompt; of every row where rows are not copied.
        peak_gib: the most memory held while reading it, weights included.
        cache_gib: what the cache holds on the GPU afterwards, all rows.
        decode_ms: milliseconds a generated token after the first.
        floor_ms: what reading the weights and the cache once would take at the bandwidth of a copy.
        fetched_mib: mebibytes a generated token of the batch brings from other tiers, where the cache counts them.
        hit_rate: which share of the pages that generated tokens asked for was on the GPU.
    """

    arm: str
    batch: int
    length: int
    prefill_s: float | None = None
    peak_gib: float | None = None
    cache_gib: float | None = None
    decode_ms: float | None = None
    floor_ms: float | None = None
    fetched_mib: float | None = None
    hit_rate: float | None = None
    why: str | None = None


def measured(model: nn.Module, arm: Arm, batch: int, length: int, chunk: int, rate: float | None, clock: Clock) -> Row:
    """Read and generate under one arm; a row that says why where it runs out of memory or time, or a peer fails.

    Args:
        chunk: tokens that an arm with chunks reads at a time.
        rate: the bandwidth of a copy in GB/s; None: no GPU, no floor.
        clock: gives the arm up.
    """
    on_gpu = next(model.parameters()).is_cuda
    if why := peers.missing(arm.needs):
        return Row(arm.name, batch, length, why=why)
    gc.collect()
    try:
        new = arm.new if on_gpu else 8
        rows, most = batch if arm.all_rows else 1, length + 4 * new + 8
        step = max(chunk // rows, 1) if arm.chunk else length
        warm = min(length, 2 * chunk)
        _prefill(model, arm, arm.make(model, batch, most), warm, min(step, warm), rows, clock)  # compiles
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = arm.make(model, batch, most)
        prefill = _prefill(model, arm, cache, length, step, rows, clock)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        if batch > 1 and not arm.all_rows:
            cache.batch_repeat_interleave(batch)
        held = bytes_held(cache.layers)["device"]
        token_s, fetched, hits = _decode(model, cache, arm.loop, batch, new, clock)
    except torch.OutOfMemoryError:
        return Row(arm.name, batch, length, why="out of memory")
    except TooSlow as late:
        return Row(arm.name, batch, length, why=str(late))
    except Exception as error:
        if arm.needs is None:
            raise
        return Row(arm.name, batch, length, why=peers.failed(arm.needs, error))
    finally:
        remove(model)
        model.__dict__.pop("_compiled_call", None)  # the next arm compiles for itself, not for a shape that changed
        torch.compiler.reset()
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    floor = None if rate is None or arm.partial else (weights + held) / rate / 1e6
    return Row(arm.name, batch, length, prefill, peak, held / 2**30, token_s * 1e3, floor, fetched, hits)


@torch.no_grad()
def _prefill(model: nn.Module, arm: Arm, cache: Any, length: int, chunk: int, batch: int, clock: Clock) -> float:
    ids, done = random_ids(model, batch, length), 0
    start = _now(model)
    for part in ids.split(chunk, 1):
        arm.read(model, part, cache)
        done += part.shape[1]
        _now(model)  # waits, or the clock would count what is only queued
        clock.check(f"{done} of {length} tokens read")
    return _now(model) - start


def _decode(
    model: nn.Module, cache: Any, loop: Callable[..., torch.Tensor] | None, batch: int, new: int, clock: Clock
) -> tuple[float, float | None, float | None]:
    """Seconds a token of `generate`, which goes on with the cache: of `new` tokens after the first, which transformers
    computes as the end of the prompt, never compiled. Median of two runs after one that compiles. And what a token
    brings from other tiers, in MiB, and the hit rate.

    The text is as long as the cache says: kvpress's counts what is left, and the rest would be read again."""
    ids = random_ids(model, 1, int(cache.get_seq_length()) + 1).expand(batch, -1)
    times: dict[int, list[float]] = {}
    runs, before = (new + 1, 1, new + 1, 1, new + 1), _traffic(cache)
    given = {"past_key_values": cache, "do_sample": False, "stopping_criteria": [clock], "custom_generate": loop}
    for tokens in runs:
        start = _now(model)
        ids = model.generate(ids, max_new_tokens=tokens, **given)
        times.setdefault(tokens, []).append(_now(model) - start)
    token_s = (statistics.median(times[new + 1][1:]) - statistics.median(times[1])) / new
    after = _traffic(cache)
    if after is None:
        return token_s, None, None
    return token_s, (after["fetched_bytes"] - before["fetched_bytes"]) / sum(runs) / 2**20, after["hit_rate"]


def _traffic(cache: Any) -> dict[str, Any] | None:
    """What a cache of ours counts of its tiers; None: it has none."""
    stats = cache.stats() if isinstance(cache, LongCache) else {}
    return stats if "fetched_bytes" in stats else None


def _now(model: nn.Module) -> float:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def random_ids(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=rng)
    return ids.expand(batch, -1).to(next(model.parameters()).device)
