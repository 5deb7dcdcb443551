"""ring: keys and values travel, in P steps, to every rank whose queries see them; for dense layers.

Source: "Ring Attention with Blockwise Transformers", arXiv 2310.01889; balanced by giving each rank a piece of the head
and one of the tail ("zigzag", of every document by itself where rows are packed). Departures: blocks go straight to who
needs them, and of the tail only what somebody sees: a rank before the owner needs all of its block, one behind it the
head's half, so all ranks together send 3/4 of the 2 Hk d N (P - 1) / P elements each of a plain ring.
"""

from __future__ import annotations

from .pairs import Pair, Pairwise, Schedule
from .strategy import strategies


@strategies.register("ring")
class Ring(Pairwise):
    """Every pair is computed where its queries live."""

    layouts = ("head_tail", "per_document", "contiguous", "chunks")

    def schedule(self, num_ranks: int) -> Schedule:
        ranks = range(num_ranks)
        return [[Pair(p, (p - t) % num_ranks, p) for p in ranks] for t in ranks]
