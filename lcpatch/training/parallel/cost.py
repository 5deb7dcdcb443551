"""Which strategy a layer should take: bytes from the strategies' own plans, pairs from the pattern, two measured rates.

Pure functions of numbers: nothing is measured here, no group is needed, every rank comes to the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf

from lcpatch_kernels import DENSE, BlockSparseSpec, Rule

from .halo import PARTS
from .layout import Documents, make_layout, sees
from .pairs import Pairwise
from .strategy import Strategy, Work, strategies

BACKWARD = 3.2  # time of a backward over its forward's, of our kernels on an H200; of their products it is 2.5


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second; measure both for a choice that is worth its name.

    Args:
        bandwidth: bytes that a rank sends to others. Default: a 400 Gbit/s port per GPU, an assumption.
        flops: of the attention kernels, on the pairs that they keep. Default: what our kernels reach in a forward on
            an H100 (kernels/results).
        latency: seconds of a transfer of nothing.
    """

    bandwidth: float = 50e9
    flops: float = 4.5e14
    latency: float = 2e-5


@dataclass(frozen=True)
class Estimate:
    """One strategy's forward and backward of one layer.

    Args:
        name: the strategy.
        problem: why it cannot serve the layer; the rest is then zero.
        seconds: of the slowest rank.
        compute, transfer: the two parts it is made of, before one hides behind the other.
        sent: bytes of the rank that sends most.
    """

    name: str
    problem: str | None
    seconds: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    sent: int = 0


@dataclass(frozen=True)
class Choice:
    """The fastest strategy, why, and every estimate."""

    name: str
    why: str
    estimates: tuple[Estimate, ...] = field(repr=False)


@lru_cache(maxsize=1024)
def choose(work: Work, rates: Rates = Rates()) -> Choice:
    """The strategy that should finish the layer first.

    Raises:
        ValueError: none can serve it.
    """
    estimates = tuple(estimate_of(name, work, rates) for name in strategies.all())
    able = sorted((e for e in estimates if e.problem is None), key=lambda e: (e.seconds, e.sent))
    if not able:
        raise ValueError("no strategy fits: " + "; ".join(f"{e.name}: {e.problem}" for e in estimates))
    best, *others = able
    told = [f"{e.name} {e.seconds * 1e3:.2f} ms" for e in others]
    why = (
        f"{best.seconds * 1e3:.2f} ms a forward and backward ({best.compute * 1e3:.2f} to compute, "
        f"{best.sent / 2**20:.1f} MiB sent in {best.transfer * 1e3:.2f})"
    )
    return Choice(best.name, why + (f"; {', '.join(told)}" if told else ""), estimates)


def choose_for(
    spec: BlockSparseSpec, num_kv_heads: int, head_dim: int, length: int, ranks: int, rates: Rates
) -> Choice:
    """`choose` for one layer over one row of `length` tokens in bf16, in the layout that `parallelize` would take.

    Raises:
        ValueError: none can serve it.
    """
    documents = (((0, length),),)
    layout = "head_tail"
    if set(spec.rules) != {DENSE}:
        layout = quickest_layout([(spec, num_kv_heads, head_dim)], length, ranks, documents, 2, rates)
    return choose(Work(spec, num_kv_heads, head_dim, make_layout(layout, length, ranks, documents), documents), rates)


def quickest_layout(
    layers: Sequence[tuple[BlockSparseSpec, int, int]],
    length: int,
    ranks: int,
    documents: Documents,
    itemsize: int,
    rates: Rates,
    names: Sequence[str] = (),
) -> str:
    """Of "contiguous" and "head_tail" the layout in which all layers take less time; if neither, the former.

    A contiguous row has fewer edges to send keys over; in the other each rank has early rows and late ones, which see
    more where a pattern reaches far back.

    Args:
        layers: spec, KV heads and head dim of each.
        length, documents: of the batch's rows.
        itemsize: bytes of a number.
        names: the strategies that may be taken, in order of preference; none: the fastest of all.
    """
    # Layers that differ by where their stripes begin cost the same, but for an edge; the first speaks for all.
    alike = Counter((_kind(spec), *rest) for spec, *rest in layers)
    first = {(_kind(spec), *rest): (spec, *rest) for spec, *rest in reversed(layers)}

    def seconds(layout: str) -> float:
        cut = make_layout(layout, length, ranks, documents)
        works = [(Work(*first[kind], cut, documents, itemsize), count) for kind, count in alike.items()]
        return sum(count * _seconds(work, rates, names) for work, count in works)

    return min(("contiguous", "head_tail"), key=seconds)


def _kind(spec: BlockSparseSpec) -> tuple[int, tuple[Rule, ...]]:
    return spec.block_size, tuple(replace(spec.rules[r], residue=0) for r in spec.head_rules)


def _seconds(work: Work, rates: Rates, names: Sequence[str]) -> float:
    """Of the strategy that will serve the work; inf where none can."""
    estimates = (estimate_of(name, work, rates) for name in names or strategies.all())
    able = [e for e in estimates if e.problem is None]
    if not able:
        return inf
    return able[0].seconds if names else min(e.seconds for e in able)


@lru_cache(maxsize=1024)
def estimate_of(name: str, work: Work, rates: Rates) -> Estimate:
    """`estimate` by name; layers of a batch, and its micro-batches, ask for the same."""
    return estimate(strategies.get(name)(), work, rates)


def estimate(strategy: Strategy, work: Work, rates: Rates) -> Estimate:
    """Forward and backward of `work` under `strategy`."""
    if problem := strategy.problem(work):
        return Estimate(strategy.name, problem)
    volume = strategy.volume(work)
    sent = max(f + b for f, b in zip(volume.forward, volume.backward, strict=True))
    transfer = sent / rates.bandwidth
    # Forward 2 products of 2 D operations a pair, and a backward.
    compute = _steps(strategy, work) * 4 * work.head_dim * (1 + BACKWARD) / rates.flops
    if isinstance(strategy, Pairwise):
        seconds = max(compute, transfer) + 4 * rates.latency * len(strategy.schedule(work.layout.num_ranks))
    elif strategy.name == "halo":  # the first part's keys travel before anything is computed
        first, rest = transfer / PARTS, transfer * (1 - 1 / PARTS)
        seconds = first + max(compute, rest) + (2 * PARTS * rates.latency if sent else 0)
    else:
        seconds = compute + transfer + 6 * rates.latency
    return Estimate(strategy.name, None, seconds, compute, transfer, sent)


def _steps(strategy: Strategy, work: Work) -> float:
    """Pairs of (query, key), over all heads, that pass while the busiest rank of each step works."""
    ranks = range(work.layout.num_ranks)
    if isinstance(strategy, Pairwise):
        steps = strategy.plan(work.layout, work.documents)
        return sum(max(_area(work, pair.q, pair.kv) for pair in step) for step in steps if step) * work.num_heads
    if strategy.name == "halo":
        return max(_pairs_of_rank(work, rank) for rank in ranks)
    heads = work.num_heads // work.layout.num_ranks
    return max(_pairs_of_heads(work, rank * heads, heads) for rank in ranks)


def _area(work: Work, queries: int, keys: int) -> int:
    area = 0
    for row in work.documents:
        for call in sees(work.layout, row, queries, keys):
            for q0, q1, k0, k1, gap in call:
                rows = q1 - q0
                area += rows * (k1 - k0) - (0 if gap else rows * (rows - 1) // 2)
    return area


def _pairs_of_rank(work: Work, rank: int) -> int:
    pairs = 0
    for row in work.documents:
        for piece in work.layout.queries(rank, row):
            start, end = piece.document
            pairs += work.spec.num_pairs(piece.start - start, piece.end - start, end - start)
    return pairs


def _pairs_of_heads(work: Work, first: int, count: int) -> int:
    spec = BlockSparseSpec(work.spec.block_size, work.spec.rules, work.spec.head_rules[first : first + count])
    return sum(spec.num_pairs(0, end - start, end - start) for row in work.documents for start, end in row)
