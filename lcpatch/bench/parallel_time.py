"""`torchrun … -m lcpatch.cli bench parallel --time`: every strategy's attention on real GPUs, beside torch's own ring.

First each strategy on each layer is checked, and torch's ring: output and gradients of every rank's tokens against
float64. Then one layer's attention is timed, forward and backward, as the slowest rank sees it, beside one GPU that
does all of it; the bytes sent must be the planned ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec, block_sparse

from ..core.errors import BenchmarkError
from ..hf.watch import Call
from ..training.parallel.cost import Rates, choose
from ..training.parallel.layout import Shard, make_layout
from ..training.parallel.link import Link
from ..training.parallel.strategy import Strategy, Work, strategies
from . import measure
from .attention_cases import Shape
from .environment import environment
from .judge import out_and_grads, passes, relative_error
from .parallel import ITEM, layers, spec_for, strategies_for
from .parallel_peer import torchs_ring
from .ranks import all_gpus, over_ranks

CHECK_LENGTH, SHRINK = 2055, 16  # an odd row, and patterns that are sparse on it
WARMUP, REPEAT = 2, 6
FACTOR = 3  # times one GPU's error: parts of results and of gradients are rounded before they are added up


@dataclass(frozen=True)
class Row:
    """One layer under one strategy; milliseconds of the slowest rank, MiB that the rank sends that sends most.

    `speedup` is over one GPU, forward and backward.
    """

    layer: str
    strategy: str
    layout: str
    length: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    sent_mib: float | None = None
    chosen: bool | None = None
    speedup: float | None = None
    why: str | None = None


def run(lengths: tuple[int, ...], shape: Shape, commit: str | None = None) -> dict[str, Any]:
    """Check, then time; on rank 0 what `Record.keep` takes, elsewhere {}.

    Raises:
        BenchmarkError: no torchrun, no GPUs, or a wrong result: nothing is timed then.
    """
    with all_gpus("--time"):
        return _run(lengths, shape, Link(), commit)


def _run(lengths: tuple[int, ...], shape: Shape, link: Link, commit: str | None) -> dict[str, Any]:
    # NCCL's communicator must not come about in a pairwise transfer.
    link.gather([link.rank], torch.device("cuda", torch.cuda.current_device()))
    first = link.rank == 0
    wrong = []
    for layer, pattern in layers(SHRINK).items():
        for name, layout in timed_for(pattern):
            error, budget = _check(pattern, name, layout, shape, link)
            if first:
                print(f"check {layer:26s} {name:10s} {layout:11s} {error:.1e} <= {budget:.1e}", flush=True)
            if not passes(error, budget):
                wrong.append(f"{name} on {layer}, {layout}")
    if wrong:
        raise BenchmarkError(f"wrong results for {', '.join(wrong)}: nothing is timed")
    peer = _peers_problem(shape, link)
    rates = Rates(bandwidth=_bandwidth(link))
    if first:
        print(f"bandwidth {rates.bandwidth / 1e9:.0f} GB/s sent by a rank in an all-to-all", flush=True)
    rows = []
    for length in lengths:
        for layer, pattern in layers().items():
            alone = _time_alone(layer, pattern, length, shape)
            found = [_time(layer, pattern, *how, length, shape, link, rates) for how in timed_for(pattern)]
            if pattern is None:
                failed = replace(TORCH, length=length, why=peer)
                found.append(_time_torch(length, shape, link) if peer is None else failed)
            found = [alone, *(_beside(row, alone) for row in found)]
            for row in found:
                _say(row, first)
            rows += map(asdict, found)
    if not first:
        return {}
    facts = {"ranks": link.size, "shape": asdict(shape), "bandwidth": rates.bandwidth}
    return {**environment(commit), **facts, "rows": rows}


def timed_for(pattern: Any) -> list[tuple[str, str]]:
    """(strategy, layout): what is counted, and for a pattern what may be faster though it sends more."""
    counted = strategies_for(pattern)
    return counted if pattern is None else [*counted, ("halo", "head_tail"), ("ulysses", "contiguous")]


def _beside(row: Row, alone: Row) -> Row:
    if row.why or alone.why:
        return row
    return replace(row, speedup=(alone.forward_ms + alone.backward_ms) / (row.forward_ms + row.backward_ms))


def _say(row: Row, first: bool) -> None:
    if not first:
        return
    start = f"{row.layer:26s} {row.strategy:10s} {row.layout:11s} {row.length:7d} "
    if row.why:
        print(start + row.why, flush=True)
    else:
        mark = " chosen" if row.chosen else ""
        sent = "" if row.sent_mib is None else f" {row.sent_mib:8.1f} MiB"
        gain = "" if row.speedup is None else f" {row.speedup:.2f}x"
        print(f"{start}{row.forward_ms:9.3f} + {row.backward_ms:9.3f} ms{gain}{sent}{mark}", flush=True)


def _random(shape: Shape, tokens: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """q, k, v and the output's gradient, as Hugging Face's layers hand them over; on the CPU with its generator."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    where = {"device": "cuda"} if generator is None else {"generator": generator}
    made = (torch.randn(shape.batch, tokens, h, shape.head_dim, dtype=torch.bfloat16, **where) for h in heads)
    return [x.transpose(1, 2).to("cuda") for x in made]


def _work(pattern: Any, layout: str, length: int, ranks: int, shape: Shape) -> Work:
    documents = (((0, length),),) * shape.batch
    cut = make_layout(layout, length, ranks, documents)
    return Work(spec_for(pattern, shape), shape.num_kv_heads, shape.head_dim, cut, documents, ITEM)


def _check(pattern: Any, name: str, layout: str, shape: Shape, link: Link) -> tuple[float, float]:
    """The relative error of the worst of out, dq, dk, dv on any rank, and what one GPU's kernel in bf16 allows for."""
    small = Shape(1, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    work = _work(pattern, layout, CHECK_LENGTH, link.size, small)
    *x, grad = _random(small, CHECK_LENGTH, torch.Generator().manual_seed(0))  # the same on every rank
    exact, budget = _exact(x, grad, work.spec)
    mine = work.layout.tokens(link.rank).to(grad.device)
    attend = _attend(strategies.get(name)(), work, link)
    got = out_and_grads(attend, [t[:, :, mine] for t in x], grad[:, :, mine])
    error = max(relative_error(a, b[:, :, mine]) for a, b in zip(got, exact, strict=True))
    error, budget = over_ranks([error, budget], grad.device)
    return error, budget


def _exact(x: list[Tensor], grad: Tensor, spec: BlockSparseSpec) -> tuple[list[Tensor], float]:
    """Output and gradients in float64, and how far from them the ranks' may be."""
    wide = [t.double() for t in x]
    exact = out_and_grads(lambda *t: block_sparse(*t, spec, impl="reference")[0], wide, grad.double())
    alone = out_and_grads(lambda *t: block_sparse(*t, spec, impl="triton")[0], x, grad)
    return exact, FACTOR * max(relative_error(a, b) for a, b in zip(alone, exact, strict=True))


def _attend(strategy: Strategy, work: Work, link: Link) -> Callable[..., Tensor]:
    shard = Shard(work.layout, work.documents, link.rank)
    return lambda q, k, v: strategy.attend(Call(q, k, v, work.spec, None, None, None, "auto"), shard, link)[0]


def _bandwidth(link: Link, size: int = 1 << 28) -> float:
    """Bytes that a rank sends to the others in a second of a large all-to-all."""
    send = torch.zeros(size, dtype=torch.uint8, device="cuda")
    receive = torch.empty_like(send)
    ms = _slowest_ms(lambda: dist.all_to_all_single(receive, send, group=link.group))
    return size * (link.size - 1) / link.size / ms * 1e3


def _slowest_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of `run` on the slowest rank, all starting together."""
    for _ in range(WARMUP):
        run()
    dist.barrier()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEAT):
        run()
    end.record()
    end.synchronize()
    return over_ranks([start.elapsed_time(end) / REPEAT], "cuda")[0]


def _time(layer: str, pattern: Any, name: str, layout: str, length: int, shape: Shape, link: Link, rates: Rates) -> Row:
    work = _work(pattern, layout, length, link.size, shape)
    *x, grad = (t.requires_grad_() for t in _random(shape, work.layout.num_tokens(link.rank)))
    strategy = strategies.get(name)()
    attend = _attend(strategy, work, link)
    shard = Shard(work.layout, work.documents, link.rank)
    link.sent = 0
    both = strategy.attend(Call(*x, work.spec, None, None, None, "auto"), shard, link)
    torch.autograd.grad(both, x, (grad, torch.zeros_like(both[1])))
    volume = strategy.volume(work)
    if link.sent != volume.forward[link.rank] + volume.backward[link.rank]:
        raise BenchmarkError(f"{name} on {layer}: rank {link.rank} sent {link.sent} bytes, planned {volume}")
    forward, backward = _times(attend, x, grad)
    sent = max(f + b for f, b in zip(volume.forward, volume.backward, strict=True)) / 2**20
    return Row(layer, name, layout, length, forward, backward, sent, choose(work, rates).name == name)


def _time_alone(layer: str, pattern: Any, length: int, shape: Shape) -> Row:
    """All of it on one GPU, by the kernel that the ranks run; every rank does it, and the slowest counts."""
    spec = spec_for(pattern, shape)
    *x, grad = (t.requires_grad_() for t in _random(shape, length))
    forward, backward = _times(lambda *t: block_sparse(*t, spec, impl="triton")[0], x, grad)
    return Row(layer, "one GPU", "", length, forward, backward)


def _times(attend: Callable[..., Tensor], x: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Milliseconds of a forward, and of what a backward adds to it."""
    with torch.no_grad():
        forward = _slowest_ms(lambda: attend(*x))
    return forward, _slowest_ms(lambda: torch.autograd.grad(attend(*x), x, grad)) - forward


TORCH = Row("dense", "torch ring", "head_tail", 0)


def _peers_problem(shape: Shape, link: Link) -> str | None:
    """Why torch's ring is not timed: what it raises, or how wrong its results are; a peer's failure is a result."""
    length = CHECK_LENGTH // (2 * link.size) * 2 * link.size
    small = Shape(1, shape.num_heads, shape.num_heads, shape.head_dim)  # it takes no GQA
    *x, grad = _random(small, length, torch.Generator().manual_seed(0))
    exact, budget = _exact(x, grad, spec_for(None, small))
    mine = make_layout("head_tail", length, link.size, (((0, length),),)).tokens(link.rank).to(grad.device)
    failed, error = None, float("inf")
    try:
        with torchs_ring([*x, grad], link.size) as (attend, parts):
            got = out_and_grads(attend, parts[:3], parts[3])
        error = max(relative_error(a, b[:, :, mine]) for a, b in zip(got, exact, strict=True))
    except (ImportError, RuntimeError, ValueError) as problem:
        failed = measure.in_a_line(problem)
    worst, budget = over_ranks([error, budget], grad.device)
    return None if passes(worst, budget) else failed or f"wrong by {worst:.1e} where {budget:.1e} is rounding"


def _time_torch(length: int, shape: Shape, link: Link) -> Row:
    """It takes no GQA, so K and V are repeated."""
    q, k, v, grad = _random(shape, length)
    k, v = (t.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for t in (k, v))
    with torchs_ring([q, k, v, grad], link.size) as (attend, parts):
        forward, backward = _times(attend, [t.requires_grad_() for t in parts[:3]], parts[3])
    return replace(TORCH, length=length, forward_ms=forward, backward_ms=backward)
