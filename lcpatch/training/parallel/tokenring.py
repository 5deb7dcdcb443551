"""tokenring: keys and values stay, queries travel, and what they find goes straight home; for dense layers.

Source: "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication",
arXiv 2412.20501. Its repository has a forward only, and no GQA. Departures: the backward is ours (the queries travel
again with dO, the merged LSE and delta = rowsum(dO * out), dQ comes home); a query that sees nothing of a rank does not
go there. It sends less than a ring only where there are few query heads or few queries: with 4 query heads a KV head,
twice as much.
"""

from __future__ import annotations

from .pairs import Pair, Pairwise, Schedule
from .strategy import strategies


@strategies.register("tokenring")
class TokenRing(Pairwise):
    """Every pair is computed where its keys live."""

    layouts = ("head_tail", "per_document", "contiguous", "chunks")

    def schedule(self, num_ranks: int) -> Schedule:
        ranks = range(num_ranks)
        return [[Pair((p + t) % num_ranks, p, p) for p in ranks] for t in ranks]
