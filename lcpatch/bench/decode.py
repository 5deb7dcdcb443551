"""`lcpatch bench decode`: one decode step of the pattern beside dense decoding by FlashAttention-2 and cuDNN.

A step moves bytes and little else. So every row gives the bytes of the keys and values that count, and the share of the
copy bandwidth, measured in the same run, that reading them amounts to. Steps are timed as replays of a CUDA graph, with
the L2 cache flushed before each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lcpatch_kernels import BlockSparseSpec, sparse_decode
from lcpatch_kernels.block_sparse.reference import keys_of

from ..core.errors import BenchmarkError
from ..patterns import AttentionPattern
from . import measure
from .attention_cases import Shape, spec_of
from .environment import environment, need_gpu
from .judge import passes, relative_error

CHECK_LENGTH = 5003


@dataclass(frozen=True)
class Row:
    """One measurement; `why` says what kept it from running."""

    provider: str
    pattern: str
    batch: int
    length: int
    megabytes: float
    ms: float | None = None
    bandwidth_share: float | None = None
    vs_fa2: float | None = None
    why: str | None = None


def run(
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    patterns: dict[str, AttentionPattern],
    shape: Shape,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Check, then measure; gives `keep` the result after each row as it is.

    Raises:
        BenchmarkError: no GPU, or a check that failed: nothing is timed then.
    """
    need_gpu()
    torch.manual_seed(0)
    result = {**environment(commit), "shape": asdict(shape)}
    result["checks"] = [check(name, pattern, shape) for name, pattern in patterns.items()]
    for c in result["checks"]:
        say(f"check {c['pattern']:14s} out {c['error']:.1e} <= {c['budget']:.1e}")
    if red := [c["pattern"] for c in result["checks"] if not c["passed"]]:
        raise BenchmarkError(f"wrong results for {', '.join(red)}: nothing is timed")
    result["copy_gb_per_s"] = measure.copy_gb_per_s()
    say(f"ceiling: copy {result['copy_gb_per_s']:.0f} GB/s")
    say(HEADER)
    result["rows"] = []
    for batch, length in product(batches, lengths):
        for row in _measure(batch, length, patterns, shape, result["copy_gb_per_s"]):
            say(format_row(row))
            result["rows"].append(asdict(row))
            keep(result)
    return result


def check(name: str, pattern: AttentionPattern, shape: Shape) -> dict[str, Any]:
    """The kernel against the reference in float64; the budget is twice the error of the reference on rounded results.

    The kernel rounds the probabilities and the output to bf16, the reference only the output.
    """
    spec = spec_of(pattern, shape)
    q, k, v = _inputs(shape, 2, CHECK_LENGTH)
    exact = sparse_decode(q.double(), k.double(), v.double(), spec=spec, impl="reference")[0]
    rounded = sparse_decode(q, k, v, spec=spec, impl="reference")[0]
    error = relative_error(sparse_decode(q, k, v, spec=spec, impl="triton")[0], exact)
    budget = 2 * relative_error(rounded, exact)
    return {"pattern": name, "error": error, "budget": budget, "passed": passes(error, budget)}


HEADER = (
    f"{'provider':12s} {'pattern':12s} {'batch':>5s} {'length':>7s} {'MB read':>9s} {'ms':>8s} "
    f"{'bandwidth':>9s} {'vs FA2':>7s}"
)


def format_row(row: Row) -> str:
    """One line under `HEADER`."""
    start = f"{row.provider:12s} {row.pattern:12s} {row.batch:5d} {row.length:7d} {row.megabytes:9.1f} "
    if row.why is not None:
        return start + row.why
    ratio = "" if row.vs_fa2 is None else f"{row.vs_fa2:6.2f}x"
    return start + f"{row.ms:8.4f} {row.bandwidth_share:9.3f} {ratio:>7s}"


def _measure(
    batch: int, length: int, patterns: dict[str, AttentionPattern], shape: Shape, copy: float
) -> Iterator[Row]:
    q, k, v = _inputs(shape, batch, length)
    whole = 2 * k.numel() * k.element_size() / 1e6
    dense = _row("FA2", "dense", batch, length, whole, _dense(SDPBackend.FLASH_ATTENTION, q, k, v), copy, None)
    yield dense
    cudnn = _dense(SDPBackend.CUDNN_ATTENTION, q, k, v)
    yield _row("cuDNN", "dense", batch, length, whole, cudnn, copy, dense)
    for name, pattern in patterns.items():
        spec = spec_of(pattern, shape)
        step = partial(sparse_decode, q, k, v, spec=spec, impl="triton")
        yield _row("lcpatch", name, batch, length, whole * _share(spec, shape, length), step, copy, dense)


def _row(
    provider: str,
    pattern: str,
    batch: int,
    length: int,
    megabytes: float,
    step: Callable[[], Any],
    copy: float,
    fa2: Row | None,
) -> Row:
    try:
        ms = measure.device_ms(measure.graphed(step))
    except (RuntimeError, torch.OutOfMemoryError) as error:  # a peer that cannot run a row is part of the result
        if provider == "lcpatch":
            raise
        torch.cuda.empty_cache()
        return Row(provider, pattern, batch, length, megabytes, why=measure.in_a_line(error))
    ratio = None if fa2 is None or fa2.ms is None else fa2.ms / ms
    return Row(provider, pattern, batch, length, megabytes, ms, megabytes / ms / copy, ratio)


def _share(spec: BlockSparseSpec, shape: Shape, length: int) -> float:
    """Share of the keys that the newest token's heads read, each KV head's once."""
    packs = spec.packs(shape.num_kv_heads)
    device = torch.device("cpu")
    counts = [len(keys_of(spec.rules[p.rule], spec.block_size, length - 1, length, length, device)) for p in packs]
    return sum(counts) / shape.num_kv_heads / length


def _inputs(shape: Shape, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16, standard deviation 1, keys and values as a cache holds them: [B, K, S, D]."""
    sizes = [(shape.num_heads, 1), (shape.num_kv_heads, length), (shape.num_kv_heads, length)]
    return tuple(torch.randn(batch, h, n, shape.head_dim, device="cuda", dtype=torch.bfloat16) for h, n in sizes)


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, enable_gqa=True)

    return step
