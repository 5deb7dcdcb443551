"""`lcpatch bench cache`: caches of a whole model, beside those of others: prefill, peak memory, decoding; and the cost
of H2O's scores.

Random weights with the geometry of Llama-3.1-8B. Each arm reads a prompt of `length` tokens and then generates. Nothing
is timed before a cache with room for everything gave the logits of a full one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lcpatch_kernels import attn_mass

from ..caches.h2o import H2OCache
from ..core.choices import chosen
from ..core.errors import BenchmarkError
from ..patching import remove
from . import measure, peers
from .cache_arm import Row, measured, random_ids
from .cache_arms import ARMS, CHUNK
from .clock import Clock
from .environment import environment, installed, need_gpu
from .geometry import LLAMA_8B, random_llama
from .judge import between_backends

LIMIT_S = 300  # for an arm at one length and batch
WIDTH = max(len(arm.name) for arm in ARMS)


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
        ValueError: no arm, an unknown one, or one that is named twice.
    """
    known = {arm.name: arm for arm in ARMS}
    wanted = [known[name] for name in chosen("arms", known if arms is None else arms, known)]
    if device == "cuda":
        need_gpu()
    geometry = geometry or LLAMA_8B
    model = random_llama(geometry, device, torch.bfloat16 if device == "cuda" else torch.float32)
    result = {**environment(commit), "geometry": geometry, "chunk": chunk}
    result["peers"] = {name: installed(name) for name in peers.INSTALL}
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
        for arm in wanted:
            row = measured(model, arm, batch, length, chunk, rate, Clock(arm.name, limit_s, say))
            say(format_row(row))
            result["rows"].append(asdict(row))
            keep(result)
    return result


def place(row: dict[str, Any]) -> tuple[int, int, int]:
    """A row's place in a result: by batch, length, and the order of `ARMS`; an arm that is no more comes last."""
    names = [arm.name for arm in ARMS]
    return row["batch"], row["length"], names.index(row["arm"]) if row["arm"] in names else len(names)


def format_row(row: Row) -> str:
    """One line of the table."""
    start = f"{row.arm:{WIDTH}s} batch {row.batch:2d} {row.length:7d} "
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
    """The logits of a prompt in chunks and of single tokens, through H2O with room for all and through DynamicCache."""
    length = min(3 * chunk // 2, 1500)
    ids = random_ids(model, 1, length + 8)

    def logits(cache: Any) -> torch.Tensor:
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :length].split(-(-length // 2), 1)]
        parts += [model(part, past_key_values=cache).logits for part in ids[:, length:].split(1, 1)]
        return torch.cat(parts, 1).float()

    dense = logits(DynamicCache(config=model.config))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        other = model(ids, use_cache=False).logits.float()
    ours = logits(H2OCache(model, budget=2 * length))
    remove(model)
    return between_backends(ours, other, dense)


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
