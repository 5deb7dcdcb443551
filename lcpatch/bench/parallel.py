"""`lcpatch bench parallel`: the bytes that each strategy sends, from the plans that it follows, beside the formulas.

No GPU and no process group: a plan is arithmetic, and tests on real ranks compare it with what they send. A count that
differs from its formula by a byte is refused. "torch's ring" is what torch's own engine moves in a forward with
either rotation: each rank's K and V to all the others, whatever the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lcpatch_kernels import DENSE, BlockSparseSpec

from ..core.errors import BenchmarkError
from ..patterns.s2 import S2
from ..patterns.sf import SF
from ..patterns.shift import Shift
from ..patterns.sink import Sink
from ..training.parallel.layout import make_layout
from ..training.parallel.lightseq import idle_fraction
from ..training.parallel.strategy import Volume, Work, strategies
from .attention_cases import Shape, spec_of
from .environment import environment

ITEM, LSE = 2, 4  # bytes of bf16 and of the fp32 log-sum-exp


@dataclass(frozen=True)
class Row:
    """One layer's forward and backward: bytes sent by a rank, on average and at most, and torch's ring over ours."""

    layer: str
    strategy: str
    layout: str
    length: int
    ranks: int
    forward: float
    forward_most: int
    backward: float
    backward_most: int
    fewer_than_ring: float


def layers(shrink: int = 1) -> dict[str, Any]:
    """The layers counted: patterns, or None for dense.

    Args:
        shrink: divides their sizes, for a check on a row that is shorter by as much.
    """
    group, blocks = 8192 // shrink, max(2, 16 // shrink)
    return {
        "shift, G = 8K": Shift(group_size=group),
        "shift, G = N/4": Shift(),
        "sf, G = 8K": SF(group_size=group),
        "sf, G = 8K, none returned": SF(group_size=group, returned_fraction=0.0),
        "sink 4+1024": Sink(window=1024 // shrink),
        "s2 64/16/16": S2(64, blocks, blocks, sink_blocks=0),
        "dense": None,
    }


def run(lengths: tuple[int, ...], ranks: int, shape: Shape, commit: str | None = None, say: Callable = print) -> dict:
    """Count, compare with the formulas; returns what `Record.keep` takes.

    Raises:
        BenchmarkError: a count that is not what its formula says.
    """
    rows = []
    for length in lengths:
        for layer, pattern in layers().items():
            for name, layout in strategies_for(pattern):
                row, work, volume = _count(layer, pattern, name, layout, length, ranks, shape)
                wanted = formula(work, name, pattern)
                if wanted is not None and wanted != volume:
                    raise BenchmarkError(f"{name} on {layer}: planned {volume}, but the formula says {wanted}")
                rows.append({**asdict(row), "formula": "equal" if wanted is not None else "none"})
                say(f"{layer:26s} {name:10s} {layout:11s} {length:7d} {row.forward / 2**20:9.2f} MiB a rank forward")
    idle = {p: idle_fraction(p) for p in (2, 3, 4, 5, 7, 8, 16)}
    for p, share in idle.items():
        if share != (0 if p % 2 else 1 / (2 * p)):
            raise BenchmarkError(f"lightseq idles in {share} of its slots on {p} ranks")
    result = {**environment(commit), "counted": _what(shape), "shape": asdict(shape)}
    return {**result, "lightseq_idle": idle, "rows": rows}


def _what(shape: Shape) -> str:
    return (
        f"{shape.num_heads} query heads over {shape.num_kv_heads} KV heads, head dim {shape.head_dim}, bf16, "
        f"batch {shape.batch}"
    )


def strategies_for(pattern: Any) -> list[tuple[str, str]]:
    """(strategy, layout) measured on a layer; `ulysses` sends the same for every pattern."""
    if pattern is not None:
        return [("halo", "contiguous")]
    return [
        *(("halo", "contiguous"), ("ulysses", "contiguous"), ("lightseq", "contiguous")),
        *(("ring", "head_tail"), ("tokenring", "head_tail")),
    ]


def spec_for(pattern: Any, shape: Shape) -> BlockSparseSpec:
    """The layer's rules; None is dense."""
    return BlockSparseSpec.of([DENSE] * shape.num_heads) if pattern is None else spec_of(pattern, shape)


def _count(
    layer: str, pattern: Any, name: str, layout: str, length: int, ranks: int, shape: Shape
) -> tuple[Row, Work, Volume]:
    documents = (((0, length),),) * shape.batch
    cut = make_layout(layout, length, ranks, documents)
    work = Work(spec_for(pattern, shape), shape.num_kv_heads, shape.head_dim, cut, documents, ITEM)
    strategy = strategies.get(name)()
    if problem := strategy.problem(work):
        raise BenchmarkError(f"{name} on {layer}: {problem}")
    volume = strategy.volume(work)
    ring = sum(torchs_ring(work))
    sent = sum(volume.forward)
    row = Row(
        *(layer, name, layout, length, ranks),
        *(sent / ranks, max(volume.forward), sum(volume.backward) / ranks, max(volume.backward)),
        ring / sent,
    )
    return row, work, volume


def torchs_ring(work: Work) -> list[int]:
    """Bytes of K and V that each rank sends in a forward of torch's ring, KV heads not repeated."""
    width = 2 * len(work.documents) * work.num_kv_heads * work.head_dim * ITEM
    return [(work.layout.num_ranks - 1) * work.layout.num_tokens(r) * width for r in range(work.layout.num_ranks)]


def formula(work: Work, name: str, pattern: Any) -> Volume | None:
    """The volume in closed form, for lengths that divide evenly; None where there is none.

    Nothing of this looks at a plan. P ranks of s tokens; K, V: bytes of a token's key (and as many of its value), Q of
    its query, L of its log-sum-exp.
    """
    ranks, rows = work.layout.num_ranks, len(work.documents)
    s, rest = divmod(work.layout.length, ranks)
    if rest or s % 2:
        return None
    kv, q = (rows * h * work.head_dim * ITEM for h in (work.num_kv_heads, work.num_heads))
    lse = rows * work.num_heads * LSE
    r = range(ranks)
    if name == "ulysses":
        h = work.num_heads // ranks
        there = rows * work.head_dim * ITEM * (h + 2 * max(1, work.num_kv_heads // ranks))
        back = rows * h * (work.head_dim * ITEM + LSE)
        both = (ranks - 1) * s * (there + back)
        return Volume((both,) * ranks, (both,) * ranks)
    if name == "ring":  # to those behind the head's half, to those before all
        sends = [s * n + s // 2 * (ranks - 1 - n) for n in r]
        returns = [s // 2 * n + s * (ranks - 1 - n) for n in r]
        again = [a + b for a, b in zip(sends, returns, strict=True)]
        return Volume(tuple(2 * kv * a for a in sends), tuple(2 * kv * a for a in again))
    if name == "tokenring":  # to those before all queries, to those behind the tail's half; home in the same way
        sends = [s * n + s // 2 * (ranks - 1 - n) for n in r]
        returns = [s // 2 * n + s * (ranks - 1 - n) for n in r]
        pairs = list(zip(sends, returns, strict=True))
        forward = tuple(q * a + (q + lse) * b for a, b in pairs)
        return Volume(forward, tuple((2 * q + 2 * lse) * a + q * b for a, b in pairs))
    if name == "lightseq":
        direct = [sum(1 for t in range(1, ranks // 2 + 1) if n + t < ranks) for n in r]  # ranks that get my K, V
        fetched = [min(n, ranks // 2) for n in r]  # ranks whose K, V I get
        helped = [n - f for n, f in zip(r, fetched, strict=True)]  # ranks that compute my queries
        helping = [ranks - 1 - n - d for n, d in zip(r, direct, strict=True)]
        forward = [s * (2 * kv * direct[n] + q * helped[n] + (q + lse) * helping[n]) for n in r]
        backward = [s * (2 * kv * (direct[n] + fetched[n]) + (2 * q + 2 * lse) * helped[n] + q * helping[n]) for n in r]
        return Volume(tuple(forward), tuple(backward))
    received = [_keys_received(work, pattern, n, s) for n in r]
    if received[0] is None:
        return None
    sent = [sum(by[n] for by in received) for n in r]
    width = 2 * rows * work.head_dim * ITEM
    return Volume(tuple(width * x for x in sent), tuple(width * sum(by) for by in received))


def _keys_received(work: Work, pattern: Any, rank: int, s: int) -> list[int] | None:
    """Keys (summed over KV heads) that `rank` gets from each rank under halo."""
    start, heads = rank * s, work.num_kv_heads
    group = work.num_heads // heads
    by = [0] * work.layout.num_ranks

    def span(first: int, last: int, times: int = 1) -> None:
        for n in range(len(by)):
            by[n] += times * max(0, min(last, (n + 1) * s, start) - max(first, n * s))

    if pattern is None:
        span(0, start, heads)
    elif isinstance(pattern, Sink):
        first = max(0, start - pattern.window + 1)
        span(first, start, heads)
        span(0, min(pattern.num_sinks, first), heads)
    elif isinstance(pattern, S2):
        b = pattern.block_size
        for head in range(heads):
            for block in range(start // b):
                local = start // b - block < pattern.local_blocks
                if local or block % pattern.stride == -head % pattern.stride or block < pattern.sink_blocks:
                    span(block * b, (block + 1) * b)
    else:  # h_i = (r s + off_i) mod G, off = 0 or G / 2
        half = work.num_heads // 2
        shifted = half - round(half * getattr(pattern, "returned_fraction", 0.0))
        size = pattern.group_size or -(-work.layout.length // round(1 / pattern.group_ratio))
        if size % 2 or shifted % group:
            return None
        for count, offset in ((heads - shifted // group, 0), (shifted // group, size // 2)):
            first = max(0, start - (start + offset) % size)
            span(first, start, count)
            span(0, min(getattr(pattern, "num_sinks", 0), first), count)
    return by
