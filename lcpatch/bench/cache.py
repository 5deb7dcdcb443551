"""Caches of a whole model: prefill, peak memory, decoding, beside those of others; and what H2O's scores cost.

Random weights with the geometry of Llama-3.1-8B. Each arm reads a prompt of `length` tokens and then generates. Rows of
a batch beyond the first are copies of the first, made after the prefill: decoding costs the same whatever they say.
Nothing is timed before every cache gave the logits of a full one where it must.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache, StoppingCriteria

from lcpatch_kernels import attn_mass

from ..caches.cache import LongCache
from ..caches.cluster import ClusterCache
from ..caches.h2o import H2OCache
from ..caches.held import bytes_held
from ..caches.retrieval import RetrievalCache
from ..caches.tiered import TieredCache
from ..core.errors import BenchmarkError
from ..hf.decode_ahead import decode_ahead
from ..patching import remove
from . import measure, peers
from .geometry import LLAMA_8B, random_llama

CHUNK = 8192
NEW_TOKENS = 32
COMPILED_TOKENS = 128
SLOW_TOKENS = 8  # half a second each: all keys and values cross the bus
GPU_BYTES = 2 << 30  # of keys and values that a tiered cache keeps on the GPU: an eighth of those of 128K tokens
LIMIT_S = 300  # for an arm at one length and batch
SAY_EVERY_S = 20


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


def _h2o_compiled(model: nn.Module, *_: int) -> H2OCache:
    return H2OCache(model, 0.2, compiled=True)


def _all_compiled(model: nn.Module, batch: int, most: int) -> H2OCache:
    return H2OCache(model, most, compiled=True)


def _cluster_compiled(model: nn.Module, *_: int) -> ClusterCache:
    return ClusterCache(model, 0.2, compiled=True)


def _retrieval_compiled(model: nn.Module, *_: int) -> RetrievalCache:
    return RetrievalCache(model, 4096, scorer="quest", compiled=True)  # of the scorers what reads most


def _tiered_compiled(model: nn.Module, *_: int) -> TieredCache:
    return TieredCache(model, gpu_bytes=GPU_BYTES, compiled=True)


ARMS = (
    Arm("DynamicCache", _dynamic),
    Arm("StaticCache, compiled", _static, CHUNK, all_rows=True, new=COMPILED_TOKENS),
    Arm("H2O 0.2", lambda model, batch, most: H2OCache(model, budget=0.2), CHUNK),
    Arm("H2O 0.2, at once", lambda model, batch, most: H2OCache(model, budget=0.2)),
    Arm("H2O, nothing evicted, compiled", _all_compiled, CHUNK, new=COMPILED_TOKENS),  # the same path, uncompressed
    Arm("H2O 0.2, compiled", _h2o_compiled, CHUNK, new=COMPILED_TOKENS),
    Arm("H2O 0.2, compiled, decode_ahead", _h2o_compiled, CHUNK, new=COMPILED_TOKENS, loop=decode_ahead),
    Arm("H2O 0.2, int8", lambda model, batch, most: H2OCache(model, budget=0.2, codec="int8"), CHUNK),
    Arm("Cluster 0.2", lambda model, batch, most: ClusterCache(model, budget=0.2), CHUNK),
    Arm("Cluster 0.2, compiled", _cluster_compiled, CHUNK, new=COMPILED_TOKENS),
    Arm("Cluster 0.2, compiled, decode_ahead", _cluster_compiled, CHUNK, new=COMPILED_TOKENS, loop=decode_ahead),
    Arm("Retrieval 4K", lambda model, batch, most: RetrievalCache(model, 4096, scorer="quest"), CHUNK, partial=True),
    Arm("Retrieval 4K, compiled", _retrieval_compiled, CHUNK, partial=True, new=COMPILED_TOKENS),
    Arm(
        "Retrieval 4K, compiled, decode_ahead",
        _retrieval_compiled,
        CHUNK,
        partial=True,
        new=COMPILED_TOKENS,
        loop=decode_ahead,
    ),
    Arm("Tiered, 2 GB", lambda model, batch, most: TieredCache(model, gpu_bytes=GPU_BYTES), CHUNK, partial=True),
    Arm("Tiered, 2 GB, compiled", _tiered_compiled, CHUNK, partial=True, new=COMPILED_TOKENS),
    Arm("DynamicCache, offloaded", lambda model, *_: _offloaded(model), CHUNK, partial=True, new=SLOW_TOKENS),
    Arm("QuantizedCache, hqq", peers.quantized("hqq"), all_rows=True, needs="hqq"),
    Arm("QuantizedCache, quanto", peers.quantized("optimum-quanto"), all_rows=True, needs="optimum-quanto"),
    Arm("SnapKV 0.2, kvpress", _dynamic, read=peers.pressed("SnapKVPress"), needs="kvpress"),
    Arm("Knorm 0.2, kvpress", _dynamic, read=peers.pressed("KnormPress"), needs="kvpress"),
)


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


def run(
    tasks: tuple[tuple[int, int], ...],
    geometry: dict[str, Any] | None = None,
    device: str = "cuda",
    arms: tuple[str, ...] | None = None,
    chunk: int = CHUNK,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    limit_s: float = LIMIT_S,
) -> dict[str, Any]:
    """Measure every (batch, length) of `tasks` in every arm; gives `keep` the result after each row as it is.

    Args:
        geometry: of the model; None: Llama-3.1-8B. A small one runs on a CPU too, where times say nothing.
        arms: names out of `ARMS`; None: all.
        chunk: tokens that an arm with chunks reads at a time.
        limit_s: seconds after which an arm is given up, between two chunks or tokens; the others go on.

    Raises:
        BenchmarkError: no GPU, or a cache that does not compute what it should.
        ValueError: an unknown arm.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("this benchmark needs a CUDA GPU; torch.cuda.is_available() is False")
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in arms or () if name not in known]:
        raise ValueError(f"arm {unknown[0]!r} is not one of {', '.join(map(repr, known))}")
    geometry = geometry or LLAMA_8B
    model = random_llama(geometry, device, torch.bfloat16 if device == "cuda" else torch.float32)
    result = {**measure.environment(commit), "geometry": geometry, "chunk": chunk}
    result["peers"] = {name: measure.installed(name) for name in peers.INSTALL}
    result["checks"] = [check(model, chunk)]
    say(f"check: H2O with room for everything against DynamicCache, logits {result['checks'][0]}")
    if not result["checks"][0]["passed"]:
        raise BenchmarkError(
            "a cache with room for everything does not give the logits of a full one: nothing is timed"
        )
    rate = None
    if device == "cuda":
        result["copy_gb_per_s"] = rate = measure.copy_gb_per_s()
        result["scores"] = [score_cost(length, geometry) for length in sorted({length for _, length in tasks})]
        for cost in result["scores"]:
            say(f"H2O's scores of {cost['length']} tokens: {cost['ms']:.2f} ms, {cost['share']:.2f} of an FA2 forward")
    result["rows"] = []
    for batch, length in tasks:
        for arm in (known[name] for name in arms or known):
            row = _measured(model, arm, batch, length, chunk, rate, _Clock(arm.name, limit_s, say))
            say(format_row(row))
            result["rows"].append(asdict(row))
            keep(result)
    return result


def format_row(row: Row) -> str:
    """One line of the table."""
    start = f"{row.arm:35s} batch {row.batch:2d} {row.length:7d} "
    if row.why is not None:
        return start + row.why
    peak = "" if row.peak_gib is None else f"  peak {row.peak_gib:5.1f} GiB"
    floor = "" if row.floor_ms is None else f" (floor {row.floor_ms:5.2f})"
    cache = f"  cache {row.cache_gib:6.3f} GiB"
    line = start + f"prefill {row.prefill_s:7.3f} s{peak}{cache}  decode {row.decode_ms:7.2f} ms/token{floor}"
    if row.fetched_mib is None:
        return line
    return line + f"  fetched {row.fetched_mib:.1f} MiB/token, hit rate {row.hit_rate:.3f}"


@torch.no_grad()
def check(model: nn.Module, chunk: int) -> dict[str, Any]:
    """The logits of a prompt in chunks and of single tokens, through H2O with room for all and through DynamicCache.

    The budget is twice the distance between two dense backends of torch, which round differently too.
    """
    length = min(3 * chunk // 2, 1500)
    ids = _ids(model, 1, length + 8)

    def logits(cache: Any) -> torch.Tensor:
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :length].split(-(-length // 2), 1)]
        parts += [model(part, past_key_values=cache).logits for part in ids[:, length:].split(1, 1)]
        return torch.cat(parts, 1).float()

    dense = logits(DynamicCache(config=model.config))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        other = model(ids, use_cache=False).logits.float()
    ours = logits(H2OCache(model, budget=2 * length))
    remove(model)
    error, budget = ((x - dense).norm().item() / dense.norm().item() for x in (ours, other))
    return {"error": error, "budget": 2 * budget, "passed": error <= 2 * budget}


def score_cost(length: int, geometry: dict[str, Any]) -> dict[str, Any]:
    """Time of H2O's column sums of one layer beside a forward of FlashAttention-2 over the same tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads = geometry["num_attention_heads"], geometry["num_key_value_heads"]
    head_dim = geometry["hidden_size"] // heads
    q, k, v = (torch.randn(1, h, length, head_dim, device="cuda").bfloat16() for h in (heads, kv_heads, kv_heads))
    lse = torch.full((1, heads, length), head_dim**0.5, device="cuda")  # any: the time does not depend on it

    def forward() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    fa2, ms = measure.device_ms(forward), measure.device_ms(lambda: attn_mass(q, k, lse))
    return {"length": length, "fa2_ms": fa2, "ms": ms, "share": ms / fa2}


def _offloaded(model: nn.Module) -> DynamicCache:
    """transformers' cache that keeps all layers but the current one in host memory; that takes a GPU."""
    return DynamicCache(config=model.config, offloading=next(model.parameters()).is_cuda)


class _TooSlow(Exception):
    """The time of an arm is up."""


class _Clock(StoppingCriteria):
    """The time that an arm takes: says now and then how far it is, and ends it when its time is up."""

    def __init__(self, arm: str, limit_s: float, say: Callable[[str], None]) -> None:
        self.arm, self.limit_s, self.say = arm, limit_s, say
        self.start = self.said = time.perf_counter()
        self.never: torch.Tensor | None = None

    def check(self, where: str) -> None:
        """Raises _TooSlow, with what was reached."""
        now = time.perf_counter()
        if now - self.start > self.limit_s:
            raise _TooSlow(f"given up after {now - self.start:.0f} s, {where}")
        if now - self.said > SAY_EVERY_S:
            self.said = now
            self.say(f"{self.arm}: {now - self.start:.0f} s, {where}")

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Asked by `generate` after each token; never stops it."""
        self.check(f"{input_ids.shape[1]} tokens read and generated")
        if self.never is None or len(self.never) != len(input_ids):  # once: a kernel a token would be timed too
            self.never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.never


def _measured(
    model: nn.Module, arm: Arm, batch: int, length: int, chunk: int, rate: float | None, clock: _Clock
) -> Row:
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
    except _TooSlow as late:
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
def _prefill(model: nn.Module, arm: Arm, cache: Any, length: int, chunk: int, batch: int, clock: _Clock) -> float:
    ids, done = _ids(model, batch, length), 0
    start = _now(model)
    for part in ids.split(chunk, 1):
        arm.read(model, part, cache)
        done += part.shape[1]
        _now(model)  # waits, or the clock would count what is only queued
        clock.check(f"{done} of {length} tokens read")
    return _now(model) - start


def _decode(
    model: nn.Module, cache: Any, loop: Callable[..., torch.Tensor] | None, batch: int, new: int, clock: _Clock
) -> tuple[float, float | None, float | None]:
    """Seconds a token of `generate`, which goes on with the cache: of `new` tokens after the first, which transformers
    computes as the end of the prompt, never compiled. Median of two runs after one that compiles. And what a token
    brings from other tiers, in MiB, and the hit rate.

    The text is as long as the cache says: kvpress's counts what is left, and the rest would be read again."""
    ids = _ids(model, 1, int(cache.get_seq_length()) + 1).expand(batch, -1)
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


def _ids(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=rng)
    return ids.expand(batch, -1).to(next(model.parameters()).device)
