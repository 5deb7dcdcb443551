"""lightseq: contiguous shards, in which ranks that would have nothing left to compute help those behind them.

Source: "DISTFLASHATTN: Distributed Memory-efficient Attention for Long-context LLMs Training" (LightSeq),
arXiv 2310.03294, section 3.2. In step t rank p computes its queries over the keys of rank p - t, if there is one; else
it takes the queries of rank r = p - t + P over its own keys, and returns the result to r. After P // 2 steps every pair
is done: the others idle in none of them (P odd) or half of them in the last (P even), 1 / (2 P) of the P x P slots that
the unbalanced schedule takes, of which it wastes about half. Departure: any P (the authors' code wants an even one).
"""

from __future__ import annotations

from .pairs import Pair, Pairwise, Schedule
from .strategy import strategies


@strategies.register("lightseq")
class LightSeq(Pairwise):
    """Pairs are computed where their queries live, the farthest ones where their keys do."""

    layouts = ("contiguous",)

    def schedule(self, num_ranks: int) -> Schedule:
        steps = []
        for t in range(num_ranks // 2 + 1):
            step = [Pair(p, p - t, p) for p in range(t, num_ranks)]
            if 2 * t < num_ranks:  # at 2 t = P both ends of a pair would compute it
                step += [Pair(p - t + num_ranks, p, p) for p in range(t)]
            steps.append(step)
        return steps


def idle_fraction(num_ranks: int) -> float:
    """Slots of the schedule in which a rank computes nothing, over the P x P slots of the unbalanced one."""
    steps = LightSeq().schedule(num_ranks)
    return sum(num_ranks - len(step) for step in steps) / num_ranks**2
