"""Which tokens of a row each rank holds, and which of them may see each other: pure arithmetic, the same on every rank.

A row's N tokens are cut into runs. A rank keeps its runs in ascending order, so a document, which is one stretch of the
row, is one stretch of the rank's own tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int]
Documents = tuple[tuple[Run, ...], ...]
"""For each batch row its documents [start, end) in the whole row; tokens in none of them are padding."""


class Piece(NamedTuple):
    """The part of a run that lies in one document: tokens [start, end) of the row, `local` on of the rank's own."""

    document: Run
    start: int
    end: int
    local: int


@dataclass(frozen=True)
class Layout:
    """A cut of a row.

    Args:
        name: "contiguous", "head_tail", "per_document" or "chunks".
        runs: for each rank its runs [start, end), ascending and not empty; together they are the row.
        begin: the first token whose query is asked. Those before it, whole runs, are only seen: chunks that were run.
    """

    name: str
    runs: tuple[tuple[Run, ...], ...]
    begin: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.runs)

    @cached_property
    def length(self) -> int:
        """Tokens of the whole row."""
        return sum(end - start for runs in self.runs for start, end in runs)

    def num_tokens(self, rank: int) -> int:
        """Tokens that `rank` holds of each row."""
        return sum(end - start for start, end in self.runs[rank])

    def num_before(self, rank: int) -> int:
        """Tokens that `rank` holds before `begin`: where its queries start in its own tokens."""
        return sum(end - start for start, end in self.runs[rank] if end <= self.begin)

    def num_queries(self, rank: int) -> int:
        """Tokens that `rank` holds from `begin` on."""
        return self.num_tokens(rank) - self.num_before(rank)

    def tokens(self, rank: int) -> Tensor:
        """Places in the whole row of the tokens that `rank` holds, ascending."""
        parts = [torch.arange(start, end) for start, end in self.runs[rank]]
        return torch.cat(parts) if parts else torch.arange(0)

    def pieces(self, rank: int, documents: tuple[Run, ...], begin: int = 0) -> list[Piece]:
        """The rank's runs, those from `begin` on, cut by the documents of one batch row, ascending."""
        found, local = [], 0
        for start, end in self.runs[rank]:
            for document in documents if start >= begin else ():
                first, last = max(start, document[0]), min(end, document[1])
                if first < last:
                    found.append(Piece(document, first, last, local + first - start))
            local += end - start
        return found

    def queries(self, rank: int, documents: tuple[Run, ...]) -> list[Piece]:
        """The pieces whose queries are asked."""
        return self.pieces(rank, documents, self.begin)

    def locate(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """For each place of the row the rank that holds it, and where among that rank's own tokens."""
        starts, owners, locals_ = self._table
        index = torch.searchsorted(starts, places, right=True) - 1
        return owners[index], places - starts[index] + locals_[index]

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = []
        for rank, runs in enumerate(self.runs):
            local = 0
            for start, end in runs:
                rows.append((start, rank, local))
                local += end - start
        return tuple(torch.tensor(sorted(rows)).view(-1, 3).T.contiguous())


@dataclass(frozen=True)
class Shard:
    """What a rank's model is told of the batch that it holds a part of. Equal on all ranks but for `rank`.

    Args:
        layout, documents: of the whole batch.
        rank: this one's number among those that share it.
        members: which ranks of the group those are; None: all.
    """

    layout: Layout
    documents: Documents
    rank: int
    members: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens(self.rank)

    @property
    def has_past(self) -> bool:
        """Whether keys come beside those of the queries' own tokens."""
        return self.layout.begin > 0

    def digest(self) -> int:
        """A number that differs where ranks were given different batches."""
        return hash((self.layout.runs, self.layout.begin, self.documents)) & (2**62 - 1)


def contiguous(length: int, num_ranks: int) -> Layout:
    """One run a rank; the first ones are a token longer where the length does not divide."""
    return Layout("contiguous", tuple(_kept([run]) for run in _cuts(0, length, num_ranks)))


def head_tail(length: int, num_ranks: int) -> Layout:
    """2 P runs, of which rank r has number r and number 2 P - 1 - r: under a causal mask the same work for all."""
    return Layout("head_tail", _head_tail([(0, length)], num_ranks))


def per_document(documents: tuple[Run, ...], length: int, num_ranks: int) -> Layout:
    """Head and tail of every document by itself: the same work for all also where rows are packed."""
    stretches, at = [], 0
    for start, end in [*documents, (length, length)]:
        stretches += [(at, start), (start, end)]  # padding, then the document
        at = end
    return Layout("per_document", _head_tail(stretches, num_ranks))


def chunked(chunks: Sequence[Run], num_ranks: int) -> Layout:
    """Of every chunk one run a rank, for the queries of the last chunk: every rank has its share of all before it.

    So all ranks have as much to do, but for the last chunk's own triangle, and none waits for another's chunk.
    """
    cuts = [_cuts(start, end, num_ranks) for start, end in chunks]
    runs = (tuple(run for run in mine if run[0] < run[1]) for mine in zip(*cuts, strict=True))
    return Layout("chunks", tuple(runs), chunks[-1][0])


def make_layout(name: str, length: int, num_ranks: int, documents: Documents) -> Layout:
    """The layout called `name`.

    Raises:
        ValueError: an unknown name, or "per_document" for rows that are packed differently.
    """
    if name == "contiguous":
        return contiguous(length, num_ranks)
    if name == "head_tail":
        return head_tail(length, num_ranks)
    if name == "per_document":
        if len(set(documents)) > 1:
            raise ValueError(
                "layout='per_document' cuts all rows of a batch alike, but they are packed or padded differently; use "
                "one row a batch, or layout='contiguous'"
            )
        return per_document(documents[0], length, num_ranks)
    raise ValueError(f"layout={name!r} is not one of 'contiguous', 'head_tail', 'per_document'")


@lru_cache(maxsize=1024)
def sees(layout: Layout, documents: tuple[Run, ...], queries: int, keys: int) -> list[list[tuple[int, ...]]]:
    """Which tokens of rank `queries` causal attention shows which of rank `keys`, as calls of `block_sparse`.

    Each call is a list of segments (q0, q1, k0, k1, gap) in the ranks' own tokens, no token in two of them; queries are
    counted from `layout.begin` on. Between two ranks a run sees another whole or not at all, so these are rectangles
    (gap = q1 - q0); a rank with itself is a triangle per document, behind what was before `begin`. One call is enough
    for the layouts above.
    """
    calls: list[list[tuple[int, ...]]] = []
    before = layout.num_before(queries)
    mine = _by_document(layout.queries(queries, documents))
    theirs = _by_document(layout.pieces(keys, tuple(mine)))
    for document, pieces in mine.items():
        first, last = pieces[0], pieces[-1]
        if queries == keys:
            end = last.local + last.end - last.start
            _add(calls, 0, (first.local - before, end - before, theirs[document][0].local, end, 0))
            continue
        steps: dict[int, list[Piece]] = {}  # number of keys seen -> the queries' pieces
        for piece in pieces:
            seen = sum(p.end - p.start for p in theirs.get(document, []) if p.end <= piece.start)
            if seen:
                steps.setdefault(seen, []).append(piece)
        for n, (seen, rows) in enumerate(steps.items()):
            q0, q1 = rows[0].local - before, rows[-1].local + rows[-1].end - rows[-1].start - before
            k0 = theirs[document][0].local
            _add(calls, n, (q0, q1, k0, k0 + seen, q1 - q0))
    return calls


def _by_document(pieces: Sequence[Piece]) -> dict[Run, list[Piece]]:
    found: dict[Run, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.document, []).append(piece)
    return found


def _add(calls: list[list[tuple[int, ...]]], n: int, segment: tuple[int, ...]) -> None:
    while len(calls) <= n:
        calls.append([])
    calls[n].append(segment)


def _cuts(start: int, end: int, parts: int) -> list[Run]:
    size, rest = divmod(end - start, parts)
    edges = [start + n * size + min(n, rest) for n in range(parts + 1)]
    return list(pairwise(edges))


def _kept(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Without empty runs, neighbours joined."""
    kept: list[Run] = []
    for start, end in sorted(runs):
        if start == end:
            continue
        if kept and kept[-1][1] == start:
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((start, end))
    return tuple(kept)


def _head_tail(stretches: Sequence[Run], num_ranks: int) -> tuple[tuple[Run, ...], ...]:
    mine: list[list[Run]] = [[] for _ in range(num_ranks)]
    for start, end in stretches:
        runs = _cuts(start, end, 2 * num_ranks)
        for rank in range(num_ranks):
            mine[rank] += [runs[rank], runs[-1 - rank]]
    return tuple(_kept(runs) for runs in mine)
