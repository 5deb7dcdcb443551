"""`lcpatch bench tune`: which tiles are fastest for each kernel, head dim and pattern on this GPU.

The kernels take their tiles from tables in `lcpatch_kernels.block_sparse.triton` and, for "mass" (its tiles are
queries, 1, keys, warps, stages), `attn_mass.triton`; this prints what to write there. All candidates are compiled side
by side in worker processes (compiling is most of the work), then timed one after another.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lcpatch_kernels import BlockSparseSpec

from . import measure
from .attention_cases import Shape, cases, spec_of
from .environment import need_gpu

KERNELS = ("fwd", "dq", "dkdv", "mass")
COMPILE_LENGTH = 300  # kernels are not compiled for a length, so a short run compiles what a long one needs


@dataclass(frozen=True)
class Job:
    """One kernel with one choice of tiles on one pattern."""

    kernel: str
    pattern: str
    shape: Shape
    tiles: tuple[int, int, int, int, int]  # block_m, pack, block_n, num_warps, num_stages


def candidates(kernel: str, head_dim: int, group: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Tiles worth trying: what fits registers and shared memory of the chips we know."""
    rows = {"dkdv": (32, 64), "mass": (32, 64, 128)}.get(kernel, (64, 128))
    columns = (64, 128) if head_dim <= 128 else (32, 64)
    stages = (2, 3, 4)
    packs = [p for p in (1, 2, 4) if p <= group and (p == 1 or kernel in ("fwd", "dq"))]
    for r, pack, n, warps, stage in itertools.product(rows, packs, columns, (4, 8), stages):
        if r // pack >= 16:
            yield r // pack, pack, n, warps, stage


def run(
    kernels: tuple[str, ...], patterns: tuple[str, ...], shape: Shape, length: int, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Time every candidate; the fastest of each kernel and pattern come first."""
    need_gpu()
    group = shape.num_heads // shape.num_kv_heads
    jobs = [
        Job(k, p, shape, tiles) for k in kernels for p in patterns for tiles in candidates(k, shape.head_dim, group)
    ]
    workers = min(len(jobs), multiprocessing.cpu_count())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        problems = list(pool.map(_compile, jobs))
    rows = []
    for kernel, pattern in itertools.product(kernels, patterns):
        timed = []
        launch = _launcher(kernel, pattern, shape, length)
        for job, problem in zip(jobs, problems, strict=True):
            if (job.kernel, job.pattern) == (kernel, pattern):
                ms = float("inf") if problem else measure.device_ms(partial(launch, job.tiles), 5, 20)
                timed.append((ms, job.tiles, problem))
        timed.sort(key=lambda row: row[0])
        for ms, tiles, problem in timed[:6]:
            say(f"{kernel:5s} {pattern:12s} D={shape.head_dim} {length}: {ms:8.3f} ms  {tiles}")
            rows.append({"kernel": kernel, "pattern": pattern, "ms": ms, "tiles": tiles, "problem": problem})
        failed = [tiles for _, tiles, problem in timed if problem]
        say(f"      {len(timed)} tried, {len(failed)} do not fit")
    return rows


def _compile(job: Job) -> str | None:
    """Run the job on a short input; what went wrong, or None."""
    try:
        _launcher(job.kernel, job.pattern, job.shape, COMPILE_LENGTH)(job.tiles)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler says, these tiles are out
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _launcher(kernel: str, pattern: str, shape: Shape, length: int) -> Callable[[tuple[int, ...]], Any]:
    from lcpatch_kernels.block_sparse import triton as kernels

    torch.manual_seed(0)
    spec: BlockSparseSpec = spec_of(cases()[pattern], shape)
    q, k, v = (x.detach() for x in shape.inputs(length))
    scale = shape.head_dim**-0.5
    if kernel == "mass":  # knows no pattern: dense
        from lcpatch_kernels.attn_mass import triton as mass

        lse = torch.full(q.shape[:3], shape.head_dim**0.5, device=q.device)
        return lambda t: mass.forward(q, k, lse, None, scale, 0.0, "sum", mass.Tiles(t[2], t[0], *t[3:]))
    if kernel == "fwd":
        return lambda tiles: kernels.forward(q, k, v, spec, None, scale, 0.0, tiles=kernels.Config(*tiles))
    out, lse = kernels.forward(q, k, v, spec, None, scale, 0.0)
    grad = torch.randn_like(out)
    terms = kernels.launch_terms(grad, None, out, lse)
    launch = kernels.launch_dq if kernel == "dq" else kernels.launch_dkdv
    return lambda tiles: launch(grad, q, k, v, terms, spec, None, scale, 0.0, tiles=kernels.Config(*tiles))
