"""What the forward and the backward kernels share: the pattern's integers, and the index sets computed from them.

Nothing here grows with the sequence length. A kernel reads ten integers of its pack, finds its segment in the bounds,
and derives from both which steps of `BLOCK_N` keys its tile of query rows takes:

    masked steps    the diagonal, the left edge of the interval, the sinks, what is left over of the stripe
    full steps      stripe blocks, then the interval's body: every row sees every key, so no mask is computed

Each key belongs to exactly one step. Names: i_ an index, b_ a block, p_ a pointer; M stacked query rows, N keys.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import DENSE, BlockSparseSpec, Rule

LOG2E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Kernel arguments that vary from batch to batch: Triton must not compile anew where one is 1 or a multiple of 16.
VARYING = [
    *("T", "S", "H", "num_segments", "num_slots", "num_packs", "num_kv_heads", "num_lines", "num_long", "team"),
    *("stride_bounds", "num_rows", "num_sinks", "chunk"),
]

# Larger values mean "the whole sequence", but int32 sums of a few of them would overflow.
_MAX_BACK, _MAX_GROUP = 1 << 29, 1 << 28


@dataclass(frozen=True)
class PackTable:
    """The packs of a spec on a device, and what the kernels may leave out because no rule has it."""

    packs: Tensor  # int32 [P, 10]: first_head, num_heads, kv_head, sinks, stride, residue, back, group, share, shifted
    starts: Tensor  # int32 [K + 1]: KV head n is read by packs starts[n] to starts[n + 1]
    flags: dict[str, bool]
    uniform: bool  # all query heads of a KV head follow one rule

    @property
    def num_packs(self) -> int:
        return self.packs.shape[0]


_recorded: dict[tuple, PackTable] = {}  # by what `pack_table` is asked for


def pack_table(spec: BlockSparseSpec, num_kv_heads: int, max_heads: int | None, device: torch.device) -> PackTable:
    """Kept, because filling it copies from the host, which a CUDA graph cannot record: the first call warms up.

    A graph reads a table where it lay when it was recorded, and nobody tells when a graph is gone. So a table that one
    recorded is kept for good: 40 bytes a pack and 4 a KV head, once for every pattern and tile that graphs of this
    process have recorded. Of others the last 256 are: patterns that follow a text's length have no end.
    """
    key = (spec, num_kv_heads, max_heads, device)
    table = _recorded.get(key) or _table(*key)
    return _recorded.setdefault(key, table) if _is_recording(device) else table


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=256)
def _table(spec: BlockSparseSpec, num_kv_heads: int, max_heads: int | None, device: torch.device) -> PackTable:
    """Made on another thread, as torch.compile directs what this one allocates while it warms up into the memory of its
    graphs, and refuses to go on where any of that lives longer than the graph's results.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_pack_table, spec, num_kv_heads, max_heads, device, stream).result()


def _pack_table(
    spec: BlockSparseSpec,
    num_kv_heads: int,
    max_heads: int | None,
    device: torch.device,
    stream: torch.cuda.Stream | None,
) -> PackTable:
    packs = spec.packs(num_kv_heads, max_heads)
    rules = [_simplest(rule) for rule in spec.rules]
    rows = [[p.first_head, p.num_heads, p.kv_head, *_fields(rules[p.rule])] for p in packs]
    starts = [next((n for n, p in enumerate(packs) if p.kv_head >= head), len(packs)) for head in range(num_kv_heads)]
    used = [rules[p.rule] for p in packs]
    with torch.cuda.stream(stream):
        tensors = [torch.tensor(x, dtype=torch.int32).to(device) for x in (rows, [*starts, len(packs)])]
    return PackTable(
        *tensors,
        {
            "HAS_SINK": any(r.sinks for r in used),
            "HAS_STRIPE": any(r.stride for r in used),
            "HAS_RATIO": any(isinstance(r.group, Fraction) for r in used),
        },
        len({(p.kv_head, p.rule) for p in packs}) == num_kv_heads,
    )


def _simplest(rule: Rule) -> Rule:
    """The rule without parts that its other parts make void."""
    return DENSE if rule.stride == 1 or rule.back >= _MAX_BACK else rule


def _fields(rule: Rule) -> list[int]:
    share = isinstance(rule.group, Fraction)
    group, den = (rule.group.numerator, rule.group.denominator) if share else (min(rule.group, _MAX_GROUP), 0)
    sinks, back = min(rule.sinks, _MAX_BACK), min(rule.back, _MAX_BACK)
    return [sinks, rule.stride, rule.residue, back, group, den, int(rule.shifted)]


@triton.jit
def _rule(p_pack, length, HAS_RATIO: tl.constexpr):
    """(sinks, stride, residue, back, group, offset) in a segment of `length` tokens, as `Rule.resolve`."""
    group = tl.load(p_pack + 7)
    shifted = tl.load(p_pack + 9) != 0
    if HAS_RATIO:
        den = tl.load(p_pack + 8)
        share = (length.to(tl.int64) * group + (den - 1)) // tl.maximum(den, 1)
        group = tl.where(den > 0, tl.maximum(share, 1).to(tl.int32), group)
        shifted = shifted & ((den == 0) | (group < length))
    offset = tl.where(shifted, group - group // 2, 0)
    return tl.load(p_pack + 3), tl.load(p_pack + 4), tl.load(p_pack + 5), tl.load(p_pack + 6), group, offset


@triton.jit
def _lo(rule, i):
    """First key of row i's interval."""
    back, group, offset = rule[3], rule[4], rule[5]
    return tl.maximum((i + offset) // group * group - offset - back, 0)


@triton.jit
def _last_row(rule, j):
    """Last row whose interval holds key j (or any before it): the inverse of `_lo`, not clipped to the segment."""
    back, group, offset = rule[3], rule[4], rule[5]
    return ((j + offset + back) // group + 1) * group - offset - 1


@triton.jit
def _is_far(rule, j, BLOCK_SIZE: tl.constexpr, HAS_SINK: tl.constexpr, HAS_STRIPE: tl.constexpr):
    """Whether every row from j on sees key j."""
    far = j < 0
    if HAS_SINK:
        far = far | (j < rule[0])
    if HAS_STRIPE:
        far = far | ((rule[1] > 0) & (j // BLOCK_SIZE % tl.maximum(rule[1], 1) == rule[2]))
    return far


@triton.jit
def _keep(rule, i, j, lo, BLOCK_SIZE: tl.constexpr, HAS_SINK: tl.constexpr, HAS_STRIPE: tl.constexpr):
    """Whether row i sees key j; i and lo broadcast against j, and the per-key part is computed on j alone."""
    keep = j >= lo
    if HAS_SINK or HAS_STRIPE:
        keep = keep | _is_far(rule, j, BLOCK_SIZE, HAS_SINK, HAS_STRIPE)
    return keep & (j <= i)


@triton.jit
def _find_segment(
    p_bounds,
    num_segments,
    slot,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GAP: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """The segment and tile that program `slot` of a batch row works on: (found, q0, k0, first, length, num_keys, tile).

    Positions go from 0 to `length`; only the first `num_keys` have a key: all of them unless GAP.

    Tiles sit on the grid of positions, so with BY_KEYS=False a segment's first tile is that of its first query. Query
    tiles count down from the row's last one, since later rows have more keys.
    """
    o_s = tl.arange(0, SEGMENTS)
    inside = o_s < num_segments
    COLUMNS: tl.constexpr = 5 if GAP else 4
    q0 = tl.load(p_bounds + COLUMNS * o_s, inside, 0)
    q1 = tl.load(p_bounds + COLUMNS * o_s + 1, inside, 0)
    k0 = tl.load(p_bounds + COLUMNS * o_s + 2, inside, 0)
    k1 = tl.load(p_bounds + COLUMNS * o_s + 3, inside, 0)
    num_keys = k1 - k0
    length = num_keys
    if GAP:
        length += tl.load(p_bounds + COLUMNS * o_s + 4, inside, 0)
    first = length - (q1 - q0)
    first_tile = tl.zeros_like(first) if BY_KEYS else first // TILE
    tiles = tl.where(q1 > q0, tl.cdiv(num_keys if BY_KEYS else length, TILE) - first_tile, 0)
    end = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    found = slot < total
    if not BY_KEYS:
        slot = total - 1 - slot
    mine = (slot >= end - tiles) & (slot < end)
    tile = slot + tl.sum(tl.where(mine, first_tile - end + tiles, 0), 0)
    return (
        found,
        tl.sum(tl.where(mine, q0, 0), 0),
        tl.sum(tl.where(mine, k0, 0), 0),
        tl.sum(tl.where(mine, first, 0), 0),
        tl.sum(tl.where(mine, length, 0), 0),
        tl.sum(tl.where(mine, num_keys, 0), 0),
        tile,
    )


@triton.jit
def _steps(
    rule,
    i_first,
    i_last,
    num_keys,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
    GAP: tl.constexpr,
):
    """How rows i_first..i_last walk their keys; `_masked_keys` and `_full_keys` read the tuple.

        0      sink_end        start        edge_end         body_end      i_last
        [sinks)  stripe blocks  [edge: lo)  [body: all see)  [diagonal    ]

    With a stripe, `start` is rounded down to a block: below it only far keys count, from it on the whole rule.
    """
    GATHER: tl.constexpr = HAS_STRIPE and BLOCK_N > BLOCK_SIZE  # several stripe blocks a step
    PER_STEP: tl.constexpr = BLOCK_N // BLOCK_SIZE if GATHER else 1
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N if BLOCK_SIZE > BLOCK_N else 1
    start, edge = _lo(rule, i_first), _lo(rule, i_last)
    seen_first, seen_last = i_first + 1, i_last + 1  # where the first row's keys end, and the last one's
    if GAP:
        start, edge = tl.minimum(start, num_keys), tl.minimum(edge, num_keys)
        seen_first, seen_last = tl.minimum(seen_first, num_keys), tl.minimum(seen_last, num_keys)
    if HAS_STRIPE:
        start = start // BLOCK_SIZE * BLOCK_SIZE
    sink_end = tl.zeros_like(start)
    if HAS_SINK:
        sink_end = tl.minimum(tl.cdiv(rule[0], BLOCK_SIZE) * BLOCK_SIZE if HAS_STRIPE else rule[0], start)
    turn = tl.zeros_like(start)  # the stripe's blocks are residue + t stride, t = turn, turn + 1, …
    stripe_steps = tl.zeros_like(start)
    left_over = tl.zeros_like(start)
    if HAS_STRIPE:
        stride = tl.maximum(rule[1], 1)
        # Both numerators are > -stride, so rounding towards zero gives 0 where there is no such block.
        turn = tl.cdiv(sink_end // BLOCK_SIZE - rule[2], stride)
        blocks = tl.maximum(tl.cdiv(start // BLOCK_SIZE - rule[2], stride) - turn, 0)
        blocks = tl.where(rule[1] > 0, blocks, 0)
        stripe_steps = blocks // PER_STEP * PER_BLOCK
        left_over = blocks % PER_STEP
    edge_steps = tl.cdiv(tl.maximum(edge - start, 0), BLOCK_N)
    edge_end = start + edge_steps * BLOCK_N
    body_steps = tl.maximum(seen_first - edge_end, 0) // BLOCK_N
    body_end = edge_end + body_steps * BLOCK_N
    diagonal_steps = tl.cdiv(tl.maximum(seen_last - body_end, 0), BLOCK_N)
    num_interval = diagonal_steps + edge_steps
    num_ranges = num_interval + tl.cdiv(sink_end, BLOCK_N)
    num_masked = num_ranges + (left_over > 0).to(tl.int32)
    return (
        num_masked,
        stripe_steps + body_steps,
        diagonal_steps,
        num_interval,
        num_ranges,
        stripe_steps,
        start,
        edge_end,
        body_end,
        sink_end,
        turn,
        left_over,
        num_keys,
    )


@triton.jit
def _masked_keys(steps, rule, t, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_STRIPE: tl.constexpr):
    """Key positions of masked step t, and which of them are in its range."""
    diagonal_steps, num_interval, num_ranges, stripe_steps = steps[2], steps[3], steps[4], steps[5]
    o_n = tl.arange(0, BLOCK_N)
    on_edge = steps[6] + (t - diagonal_steps) * BLOCK_N
    # The diagonal goes first: it gives every row a finite maximum.
    base = tl.where(t < diagonal_steps, steps[8] + t * BLOCK_N, tl.where(t < num_interval, on_edge, 0))
    base = tl.where(t >= num_interval, (t - num_interval) * BLOCK_N, base)
    j = base + o_n
    inside = j < tl.where(t < num_interval, steps[12], steps[9])
    if HAS_STRIPE and BLOCK_N > BLOCK_SIZE:
        turn = steps[10] + stripe_steps * (BLOCK_N // BLOCK_SIZE)
        gathered = (rule[2] + (turn + o_n // BLOCK_SIZE) * rule[1]) * BLOCK_SIZE + o_n % BLOCK_SIZE
        is_stripe = t >= num_ranges
        j = tl.where(is_stripe, gathered, j)
        inside = tl.where(is_stripe, o_n // BLOCK_SIZE < steps[11], inside)
    return j, inside


@triton.jit
def _full_keys(steps, rule, t, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_STRIPE: tl.constexpr):
    """Key positions of full step t: a scalar, which alone takes 64-bit arithmetic, and a [N] vector to add."""
    o_n = tl.arange(0, BLOCK_N)
    base = steps[7] + (t - steps[5]) * BLOCK_N
    if HAS_STRIPE:
        is_stripe = t < steps[5]
        if BLOCK_N > BLOCK_SIZE:
            block = rule[2] + (steps[10] + t * (BLOCK_N // BLOCK_SIZE)) * rule[1]
            gathered = o_n // BLOCK_SIZE * (rule[1] * BLOCK_SIZE) + o_n % BLOCK_SIZE
            return tl.where(is_stripe, block * BLOCK_SIZE, base), tl.where(is_stripe, gathered, o_n)
        else:
            block = rule[2] + (steps[10] + t // (BLOCK_SIZE // BLOCK_N)) * rule[1]
            base = tl.where(is_stripe, block * BLOCK_SIZE + t % (BLOCK_SIZE // BLOCK_N) * BLOCK_N, base)
    return base, o_n


@triton.jit
def _fast_key(
    steps,
    rule,
    t,
    diagonal,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_STRIPE: tl.constexpr,
):
    """First key of step t of those that descriptors load: `diagonal` masked steps, then the full ones."""
    j0, _ = _full_keys(steps, rule, tl.maximum(t - diagonal, 0), BLOCK_N, BLOCK_SIZE, HAS_STRIPE)
    return tl.where(t < diagonal, steps[8] + t * BLOCK_N, j0)


@triton.jit
def _load(p, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, BLOCK_D] at `p + offsets` (in elements), zero outside `inside` (ignored unless MASKED) and from D on."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = p + offsets[:, None] + o_d[None, :]
    if MASKED and D < BLOCK_D:
        x = tl.load(p_x, inside[:, None] & (o_d[None, :] < D), 0.0)
    elif MASKED:
        x = tl.load(p_x, inside[:, None], 0.0)
    elif D < BLOCK_D:
        x = tl.load(p_x, o_d[None, :] < D, 0.0)
    else:
        x = tl.load(p_x)
    if UPCAST:  # the interpreter holds bf16 as raw uint16 and would multiply the bits
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_box(descriptor, i_batch, i_head, row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """`_load` of consecutive rows by a tensor descriptor over [B, H, rows, D]; zero outside of the tensor."""
    x = descriptor.load([i_batch.to(tl.int32), i_head.to(tl.int32), row.to(tl.int32), 0]).reshape(ROWS, BLOCK_D)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(p, offsets, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_x = p + offsets[:, None] + o_d[None, :]
    tl.store(p_x, x.to(p.dtype.element_ty), inside[:, None] & (o_d[None, :] < D))


@triton.jit
def _tanh(x2):
    """tanh(x) from x2 = 2 log2(e) x; saturates correctly, since exp2 overflows to inf and underflows to 0."""
    return 1.0 - 2.0 / (tl.exp2(x2) + 1.0)
