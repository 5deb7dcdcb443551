"""halo: each rank gets exactly the keys and values that its rows' rules let them see, and nothing else travels.

From the pattern's neutral description (`BlockSparseSpec`) every rank computes, for every rank, which keys each KV head
needs there. One uneven all-to-all brings them, its reverse takes their gradients back. Dense layers work too; they need
everything before.

Keys that arrive are put in order as a shorter sequence in which the same rules hold (`shorter`).

KV heads are exchanged in `PARTS` groups, so that the attention of one runs while the next one's keys travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lcpatch_kernels import DENSE, BlockSparseSpec, Rule, block_sparse

from ...hf.watch import Call
from .layout import Documents, Layout, Piece, Run, Shard
from .link import Link, tie
from .shorter import Shorter, fixed, keys_seen
from .strategy import Strategy, Volume, Work, bounds_tensor, flat, strategies, take

PARTS = 2


@strategies.register("halo")
class Halo(Strategy):
    """The pattern's own mask says what travels."""

    def attend(self, call: Call, shard: Shard, link: Link) -> tuple[Tensor, Tensor]:
        work = Work.of(call, shard)
        layout = (work.layout, work.documents, shard.rank, str(call.query.device))
        parts = [_part(work.spec, work.num_kv_heads, n, *layout) for n in range(_num_parts(work))]
        rows = [_rows(call, part) for part in parts]
        arriving = [
            link.exchange(take(own, part.send), part.sends, part.receives) if part.counts.any() else None
            for part, own in zip(parts, rows, strict=True)
        ]
        results = []
        for part, own, arrive in zip(parts, rows, arriving, strict=True):
            arrived = None if arrive is None else arrive()
            out, lse = _attend_part(call, part, own, arrived)
            # A rank that needs nothing takes part in the way back, too, and has gradients (of zero) for its weights.
            if not part.calls:
                out = tie(out, own)
            results.append((out if arrived is None else tie(out, arrived), lse))
        out, lse = zip(*results, strict=True)
        return torch.cat(out, 1), torch.cat(lse, 1)

    def volume(self, work: Work) -> Volume:
        plan = (work.spec, work.num_kv_heads)
        counts = sum(_counts(*plan, n, work.layout, work.documents) for n in range(_num_parts(work)))
        sent = counts * 2 * work.head_dim * work.itemsize  # K and V
        return Volume(tuple(sent.sum(1).tolist()), tuple(sent.sum(0).tolist()))  # gradients go the other way

    def problem(self, work: Work) -> str | None:
        if work.spec.is_cyclic:
            return "rolled groups (wrap=True) are not causal intervals; 'ulysses' runs them"
        if work.layout.begin and all(work.spec.rules[r] == DENSE for r in work.spec.head_rules):
            return "a dense layer's graph would hold all that was before the chunk; 'tokenring' sends its queries there"
        return None


@dataclass(frozen=True)
class PartCall:
    """One call of `block_sparse`: some of the part's query heads, those of their rows that share a rule.

    Args:
        group: number of the head class that the call belongs to.
        spec: the rules, as they hold for the shorter sequence.
        bounds: [B, N, 4].
        index: [B, V, S] into the part's rows (own, then arrived); None: own keys as they are.
    """

    group: int
    spec: BlockSparseSpec
    bounds: Tensor
    index: Tensor | None


@dataclass(frozen=True)
class Part:
    """What a rank does for some of the KV heads.

    Args:
        kv_heads: which.
        send: rows (batch, KV head, token) of the rank's own to send, by receiver.
        sends, receives: how many for and from each rank.
        counts: [P, P] of all ranks, sender by receiver.
        groups: query heads (of the layer) and KV heads (of the part, one per virtual KV head) of each class.
        order: what puts the classes' query heads, one class behind the other, into the layer's order.
        calls: the attention calls.
    """

    kv_heads: slice
    send: Tensor
    sends: list[int]
    receives: list[int]
    counts: Tensor
    groups: list[tuple[slice | Tensor, slice | Tensor]]
    order: Tensor
    calls: list[PartCall]


def _num_parts(work: Work) -> int:
    return min(PARTS, work.num_kv_heads)


def _heads_of_part(num_kv_heads: int, part: int) -> range:
    parts = min(PARTS, num_kv_heads)
    return range(part * num_kv_heads // parts, (part + 1) * num_kv_heads // parts)


def _rows(call: Call, part: Part) -> Tensor:
    """The part's own keys and values, [B * heads * t, 2, D]."""
    return torch.stack([flat(x[:, part.kv_heads]) for x in (call.key, call.value)], 1)


def _attend_part(call: Call, part: Part, own: Tensor, arrived: Tensor | None) -> tuple[Tensor, Tensor]:
    table = None
    results: list[tuple[Tensor, Tensor] | None] = [None] * len(part.groups)
    for c in part.calls:
        heads, kv = part.groups[c.group]
        if c.index is None:
            k, v = (x[:, part.kv_heads][:, kv] for x in (call.key, call.value))
        else:
            if table is None:
                table = own if arrived is None else torch.cat([own, arrived])
            k, v = take(table, c.index).unbind(3)
        q = call.query[:, heads]
        result = block_sparse(q, k, v, c.spec, bounds=c.bounds, scale=call.scale, softcap=call.softcap, impl=call.impl)
        known = results[c.group]
        results[c.group] = result if known is None else _united(known, result)
    return _assembled(call, part, results)


def _united(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results of which each row is in one: the other has 0 and -inf there."""
    return a[0] + b[0], torch.where(a[1] == -torch.inf, b[1], a[1])


def _assembled(call: Call, part: Part, results: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """The part's query heads in order; a rank without tokens still has an output, so that its backward runs."""
    out, lse = [], []
    for (heads, _), result in zip(part.groups, results, strict=True):
        if result is None:
            nothing = call.query[:, heads] * 0
            wide = torch.float64 if nothing.dtype == torch.float64 else torch.float32
            result = nothing, nothing.sum(-1, dtype=wide) - torch.inf
        out.append(result[0])
        lse.append(result[1])
    if len(out) == 1:
        return out[0], lse[0]
    return torch.cat(out, 1)[:, part.order], torch.cat(lse, 1)[:, part.order]


@lru_cache(maxsize=256)
def _counts(spec: BlockSparseSpec, num_kv_heads: int, part: int, layout: Layout, documents: Documents) -> Tensor:
    """Keys that each rank sends to each, [P, P], summed over batch rows and the part's KV heads."""
    counts = torch.zeros(layout.num_ranks, layout.num_ranks, dtype=torch.int64)
    for receiver in range(layout.num_ranks):
        for _, _, owner, _ in _missing(spec, num_kv_heads, part, layout, documents, receiver):
            counts[:, receiver] += owner.bincount(minlength=layout.num_ranks)
    return counts


def _missing(
    spec: BlockSparseSpec, num_kv_heads: int, part: int, layout: Layout, documents: Documents, rank: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """What `rank` needs and does not hold, in the order of arrival but for the sender.

    Yields:
        for each batch row and KV head of the part: number of the pair, places in the row (ascending), the rank that
        holds each, and where among that rank's tokens.
    """
    group = spec.num_heads // num_kv_heads
    heads = _heads_of_part(num_kv_heads, part)
    for b, row in enumerate(documents):
        for n, head in enumerate(heads):
            rules = tuple(spec.rules[r] for r in sorted(set(spec.head_rules[head * group : (head + 1) * group])))
            yield b * len(heads) + n, *_missing_of(rules, spec.block_size, layout, row, rank)


@lru_cache(maxsize=512)  # rows that are cut alike need alike; so do heads, also of other layers
def _missing_of(
    rules: tuple[Rule, ...], block_size: int, layout: Layout, documents: tuple[Run, ...], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    needed = [torch.arange(0)]
    for piece in layout.queries(rank, documents):
        first, last, length = _positions(piece)
        if first:  # else all that its rows see is in the piece
            needed += [keys_seen(fixed(r, length), block_size, first, last, length) + piece.document[0] for r in rules]
    places = torch.cat(needed).unique()
    owner, local = layout.locate(places)
    missing = owner != rank
    return places[missing], owner[missing], local[missing]


def _positions(piece: Piece) -> tuple[int, int, int]:
    """(first, last + 1, length): positions of a piece in its document, and the document's length."""
    start, end = piece.document
    return piece.start - start, piece.end - start, end - start


@lru_cache(maxsize=64)  # megabytes each, on the device: a batch's layers, and not of many batches that are gone
def _part(
    spec: BlockSparseSpec, num_kv_heads: int, part: int, layout: Layout, documents: Documents, rank: int, device: str
) -> Part:
    heads = _heads_of_part(num_kv_heads, part)
    counts = _counts(spec, num_kv_heads, part, layout, documents)
    send = []
    for receiver in range(layout.num_ranks):
        num_tokens = layout.num_tokens(rank)
        for pair, _, owner, local in _missing(spec, num_kv_heads, part, layout, documents, receiver):
            send.append(local[owner == rank] + pair * num_tokens)
    builder = _Builder(spec, num_kv_heads, heads, layout, documents, rank, part)
    groups = [(_select(q, device), _select(kv, device)) for q, kv, _ in builder.groups]
    order = torch.cat([q for q, _, _ in builder.groups]).argsort()
    return Part(
        slice(heads.start, heads.stop),
        torch.cat(send).to(device),
        counts[rank].tolist(),
        counts[:, rank].tolist(),
        counts,
        groups,
        order.to(device),
        builder.calls(torch.device(device)),
    )


def _select(index: Tensor, device: str) -> slice | Tensor:
    """The index, as a slice where that is one: it makes a view, not a copy."""
    first, last = int(index[0]), int(index[-1]) + 1
    return slice(first, last) if index.equal(torch.arange(first, last)) else index.to(device)


class _Builder:
    """Makes a part's attention calls. Virtual KV heads: a KV head once for each run of query heads with one rule."""

    def __init__(
        self,
        spec: BlockSparseSpec,
        num_kv_heads: int,
        heads: range,
        layout: Layout,
        documents: Documents,
        rank: int,
        part: int,
    ) -> None:
        self.spec, self.heads, self.layout, self.documents, self.rank = spec, heads, layout, documents, rank
        self.num_tokens, self.num_before = layout.num_tokens(rank), layout.num_before(rank)
        self.num_own = len(documents) * len(heads) * self.num_tokens
        self.size = _run_of_heads(spec, num_kv_heads)
        group = spec.num_heads // num_kv_heads
        classes: dict[Rule, list[tuple[int, int, Rule]]] = {}  # rule without residue -> (query head, KV head, rule)
        for first in range(heads.start * group, heads.stop * group, self.size):
            rule = spec.rules[spec.head_rules[first]]
            classes.setdefault(replace(rule, residue=0), []).append((first, first // group - heads.start, rule))
        self.groups = []
        for found in classes.values():
            q = torch.tensor([first + n for first, _, _ in found for n in range(self.size)])
            self.groups.append((q, torch.tensor([kv for _, kv, _ in found]), [rule for _, _, rule in found]))
        self.arrivals = self._arrivals(num_kv_heads, part)

    def _arrivals(self, num_kv_heads: int, part: int) -> dict[int, tuple[Tensor, Tensor]]:
        """For each (batch row, KV head) the places that arrive, ascending, and their rows in the part's table."""
        found = list(_missing(self.spec, num_kv_heads, part, self.layout, self.documents, self.rank))
        self.num_arrived = sum(len(places) for _, places, _, _ in found)
        owner = torch.cat([owner for _, _, owner, _ in found])
        rows = torch.empty(self.num_arrived, dtype=torch.int64)
        rows[owner.argsort(stable=True)] = torch.arange(self.num_arrived)  # they arrive by sender
        split = (rows + self.num_own).split([len(places) for _, places, _, _ in found])
        return {pair: (places, row) for (pair, places, _, _), row in zip(found, split, strict=True)}

    def calls(self, device: torch.device) -> list[PartCall]:
        """A call for each class of heads and each rule that holds for some of the rank's pieces."""
        calls = []
        for number, (_, kv, rules) in enumerate(self.groups):
            found: dict[tuple, list[list[tuple]]] = {}
            for b, row in enumerate(self.documents):
                for piece in self.layout.queries(self.rank, row):
                    first, last, length = _positions(piece)
                    shorter = Shorter.of(rules, self.spec.block_size, first, last, length) if first else None
                    if shorter is None:  # the document begins here
                        key = (True, tuple(fixed(rule, length) for rule in rules))
                    else:
                        key = (not shorter.num_far and shorter.start == first, tuple(shorter.rules))
                    found.setdefault(key, [[] for _ in self.documents])[b].append((piece, shorter))
            for (own, new_rules), rows in found.items():
                spec = BlockSparseSpec.of([r for r in new_rules for _ in range(self.size)], self.spec.block_size)
                bounds, index = self._own(rows) if own else self._gathered(rows, kv)
                index = None if index is None else index.to(device)
                calls.append(PartCall(number, spec, bounds_tensor(bounds, 4, device), index))
        return calls

    def _own(self, rows: list[list[tuple[Piece, Any]]]) -> tuple[list[list[tuple[int, ...]]], None]:
        spans = [[(p.local, p.local + p.end - p.start) for p, _ in row] for row in rows]
        return [
            [(start - self.num_before, end - self.num_before, start, end) for start, end in row] for row in spans
        ], None

    def _gathered(
        self, rows: list[list[tuple[Piece, Shorter]]], kv: Tensor
    ) -> tuple[list[list[tuple[int, ...]]], Tensor]:
        """Bounds and index of pieces whose keys are not simply the rank's own."""
        bounds: list[list[tuple[int, ...]]] = []
        most = max(sum(shorter.length for _, shorter in row) for row in rows)
        # Slots that no row sees hold any keys, each another: a backward adds its zeros to them.
        index = torch.arange(len(rows) * len(kv) * most).view(len(rows), len(kv), most)
        index %= self.num_own + self.num_arrived
        for b, row in enumerate(rows):
            bounds.append([])
            at = 0
            for piece, shorter in row:
                q0 = piece.local - self.num_before
                bounds[-1].append((q0, q0 + piece.end - piece.start, at, at + shorter.length))
                for n, (head, (keys, slots)) in enumerate(zip(kv.tolist(), shorter.keys, strict=True)):
                    index[b, n, at + slots] = self._find(b, head, keys + piece.document[0])
                at += shorter.length
        return bounds, index

    def _find(self, b: int, head: int, places: Tensor) -> Tensor:
        """Rows of the part's table that hold these places of batch row b."""
        pair = b * len(self.heads) + head
        owner, local = self.layout.locate(places)
        arrived, rows = self.arrivals[pair]
        if not len(arrived):
            return local + pair * self.num_tokens
        at = torch.searchsorted(arrived, places).clamp(max=len(arrived) - 1)
        return torch.where(owner == self.rank, local + pair * self.num_tokens, rows[at])


def _run_of_heads(spec: BlockSparseSpec, num_kv_heads: int) -> int:
    """The most query heads that, taken in runs, share KV head and rule everywhere: a divisor of the group."""
    group = spec.num_heads // num_kv_heads
    sizes = [n for n in range(1, group + 1) if group % n == 0]
    rules = spec.head_rules
    return max(n for n in sizes if all(len(set(rules[i : i + n])) == 1 for i in range(0, len(rules), n)))
