"""balance: batches of mixed lengths over many ranks, each sequence on as many as it needs, all done at the same time.

Source: "ByteScale: Efficient Scaling of LLM Training with a 2048K Context Length on More Than 12,000 GPUs",
arXiv 2502.21231, sections 4 and 5: hybrid data parallelism, in which a long sequence spreads over several ranks and
short ones are packed on one; assignment by FLOPs, longest first; as many micro-batches a rank as balance wants;
activations moved to the host only as far as that saves ranks. Departures: a sequence that would take longer than the
rest of the batch on the ranks that its memory needs gets more; while a rank waits for others it does short sequences.

Pure Python: it decides, and moves nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from ...core.errors import ParallelError


@dataclass(frozen=True)
class Costs:
    """What a layer takes for a sequence of s tokens on one rank, measured or estimated.

    Args:
        square, linear, fixed: seconds are square s^2 + linear s + fixed.
        bytes_per_token, bytes_fixed: activations are bytes_per_token s + bytes_fixed.
        bandwidth: bytes a second between device and host, the slower way.
        num_layers: layers; the first and the last are never moved to the host.
    """

    square: float = 1.0
    linear: float = 4096.0
    fixed: float = 0.0
    bytes_per_token: float = 1.0
    bytes_fixed: float = 0.0
    bandwidth: float = 0.0
    num_layers: int = 32

    def seconds(self, tokens: int) -> float:
        """Of one layer."""
        return self.square * tokens * tokens + self.linear * tokens + self.fixed

    def activations(self, tokens: int) -> float:
        """Bytes of one layer."""
        return self.bytes_per_token * tokens + self.bytes_fixed


@dataclass(frozen=True)
class MicroBatch:
    """Sequences (by their number in the batch) that some ranks compute together.

    Args:
        sequences: one that is spread over the ranks, or several that are packed on one rank.
        ranks: which ranks, ascending.
        tokens: most tokens that one of them holds.
        seconds: how long it takes, in the unit of `Costs.seconds`.
    """

    sequences: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A batch's micro-batches, in an order that every rank keeps to: it computes those it is in, one by one."""

    batches: tuple[MicroBatch, ...]
    num_ranks: int

    def of(self, rank: int) -> list[MicroBatch]:
        """What `rank` computes."""
        return [batch for batch in self.batches if rank in batch.ranks]

    def counts(self) -> list[int]:
        """Micro-batches of each rank."""
        counts = [0] * self.num_ranks
        for batch in self.batches:
            for rank in batch.ranks:
                counts[rank] += 1
        return counts

    def makespan(self) -> float:
        """When the last rank is done, if a micro-batch starts as soon as all of its ranks are free."""
        free = [0.0] * self.num_ranks
        for batch in self.batches:
            end = max(free[rank] for rank in batch.ranks) + batch.seconds
            for rank in batch.ranks:
                free[rank] = end
        return max(free)


def plan(lengths: Sequence[int], num_ranks: int, capacity: int, costs: Costs = Costs()) -> Plan:
    """Assign every sequence to ranks.

    Args:
        lengths: tokens of each sequence.
        num_ranks: data-parallel times context-parallel ranks.
        capacity: tokens that a rank can hold at once.
        costs: seconds of a sequence by its length; spread over n ranks it takes the n-th part.

    Raises:
        ParallelError: a sequence of no tokens, or of more than all ranks can hold.
    """
    if capacity < 1 or num_ranks < 1:
        raise ParallelError(f"capacity={capacity} and num_ranks={num_ranks} must be at least 1")
    for number, n in enumerate(lengths):
        if not 1 <= n <= capacity * num_ranks:
            raise ParallelError(
                f"sequence {number} has {n} tokens; {num_ranks} ranks of {capacity} tokens hold 1 to "
                f"{capacity * num_ranks}: cut it, or use more ranks"
            )
    if not lengths:
        return Plan((), num_ranks)
    seconds = [costs.seconds(n) for n in lengths]
    bound = lower_bound(lengths, num_ranks, costs)
    best, shortest = None, inf
    for slack in (1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0):
        found = _assign(lengths, seconds, num_ranks, capacity, bound * slack)
        if (makespan := found.makespan()) < shortest:
            best, shortest = found, makespan
        if shortest <= bound * max(slack, 1.01):
            break
    return best


def lower_bound(lengths: Sequence[int], num_ranks: int, costs: Costs) -> float:
    """No assignment is done before: all work spread evenly over all ranks."""
    return sum(costs.seconds(n) for n in lengths) / num_ranks


def _assign(lengths: Sequence[int], seconds: Sequence[float], num_ranks: int, capacity: int, target: float) -> Plan:
    """The plan in which a sequence is spread until it takes at most `target`."""
    spread, single = [], []
    for number, n in enumerate(lengths):
        width = min(max(ceil(n / capacity), ceil(seconds[number] / target)), num_ranks, n)
        (spread if width > 1 else single).append((seconds[number] / width, width, number))
    # Widest first: a wide one waits for the last of its ranks, and at the start none is waited for.
    spread.sort(key=lambda item: (-item[1], -item[0]))
    single.sort(reverse=True)
    free = [0.0] * num_ranks
    waits: list[list[tuple[int, float]]] = []  # before each spread sequence: (rank, seconds it would idle)
    places = []
    for took, width, number in spread:
        ranks = sorted(range(num_ranks), key=free.__getitem__)[:width]
        start = free[ranks[-1]]
        waits.append([(rank, start - free[rank]) for rank in ranks])
        for rank in ranks:
            free[rank] = start + took
        places.append((number, tuple(sorted(ranks)), took, -(-lengths[number] // width)))
    fillers, rest = _fill(single, waits)
    heap = [(busy, rank) for rank, busy in enumerate(free)]
    heapq.heapify(heap)
    tails: list[list[int]] = [[] for _ in range(num_ranks)]
    for took, _, number in rest:
        busy, rank = heapq.heappop(heap)
        tails[rank].append(number)
        heapq.heappush(heap, (busy + took, rank))
    batches: list[MicroBatch] = []
    for place, filler in zip(places, fillers, strict=True):
        for rank, numbers in filler:
            batches += _packed(numbers, rank, lengths, seconds, capacity)
        number, ranks, took, tokens = place
        batches.append(MicroBatch((number,), ranks, tokens, took))
    for rank, numbers in enumerate(tails):
        batches += _packed(numbers, rank, lengths, seconds, capacity)
    return Plan(tuple(batches), num_ranks)


def _fill(
    single: list[tuple[float, int, int]], waits: list[list[tuple[int, float]]]
) -> tuple[list[list[tuple[int, list[int]]]], list[tuple[float, int, int]]]:
    """Short sequences for the time that ranks wait, the longest that fit first; and those that are left over."""
    holes = [(-room, step, rank) for step, row in enumerate(waits) for rank, room in row if room > 0]
    heapq.heapify(holes)
    filled: dict[tuple[int, int], list[int]] = {}
    rest = []
    for item in single:
        if not holes or -holes[0][0] < item[0]:
            rest.append(item)
            continue
        room, step, rank = heapq.heappop(holes)
        filled.setdefault((step, rank), []).append(item[2])
        heapq.heappush(holes, (room + item[0], step, rank))
    fillers: list[list[tuple[int, list[int]]]] = [[] for _ in waits]
    for (step, rank), numbers in filled.items():
        fillers[step].append((rank, numbers))
    return fillers, rest


def _packed(
    numbers: Sequence[int], rank: int, lengths: Sequence[int], seconds: Sequence[float], capacity: int
) -> list[MicroBatch]:
    """One rank's sequences as micro-batches of at most `capacity` tokens, first fit."""
    packs: list[list[int]] = []
    room: list[int] = []
    open_from = 0  # packs before this one are full
    for number in numbers:
        n = lengths[number]
        place = next((p for p in range(open_from, len(packs)) if room[p] >= n), None)
        if place is None:
            packs.append([])
            room.append(capacity)
            place = len(packs) - 1
            open_from = max(open_from, len(packs) - 8)
        packs[place].append(number)
        room[place] -= n
    return [
        MicroBatch(tuple(pack), (rank,), capacity - left, sum(seconds[n] for n in pack))
        for pack, left in zip(packs, room, strict=True)
    ]


def offload_ratio(tokens: int, capacity: int, costs: Costs) -> tuple[float, int]:
    """`(r, ranks)`: which share of a sequence's activations to keep on the host, and the ranks that it then needs.

    r is the smallest share that gets the sequence onto the fewest ranks, of those that travel while a layer computes:
    r Act(s) / bandwidth <= T(s). With r = 0 it needs Act(s) / Act(C) ranks.

        ranks = ceil((2 Act(s) + (1 - r) (l - 2) Act(s)) / (l Act(C)))
    """
    layers, act, room = costs.num_layers, costs.activations(tokens), costs.activations(capacity)
    if layers <= 2 or not costs.bandwidth:
        return 0.0, ceil(act / room)

    def ranks(r: float) -> int:
        return max(1, ceil((2 * act + (1 - r) * (layers - 2) * act) / (layers * room) - 1e-9))

    most = min(1.0, costs.seconds(tokens) * costs.bandwidth / act)
    fewest = ranks(most)
    if fewest == ranks(0.0):
        return 0.0, fewest
    least = (layers * act - fewest * layers * room) / ((layers - 2) * act)
    return min(most, max(0.0, least)), fewest


def check_host(plan: Plan, model: object) -> None:
    """Refuse a host that would wait for ever.

    Raises:
        ParallelError: ranks with unequal numbers of micro-batches under FSDP or ZeRO-3, whose every forward is a
            collective of all ranks.
    """
    counts = plan.counts()
    if len(set(counts)) <= 1 or not hasattr(model, "modules"):
        return
    sharded = any("FSDP" in cls.__name__ for m in model.modules() for cls in type(m).__mro__)
    zero3 = any(hasattr(p, "ds_id") for p in model.parameters())
    if sharded or zero3:
        raise ParallelError(
            f"ranks have {min(counts)} to {max(counts)} micro-batches, but under {'FSDP' if sharded else 'ZeRO-3'} "
            "every forward gathers weights from all ranks, so the others would wait for ever; use LoRA with DDP and "
            "no_sync(), or ZeRO-1"
        )
