"""Ranks that would exchange other keys than their peers expect. Each function runs on every rank."""

from __future__ import annotations

from models import SHORT, build
from parallel_cases import batch_of

import lcpatch
from lcpatch.training.parallel import Rates, parallelize


def other_mode(rank: int) -> None:
    """Rank 1 evaluates, where the pattern is off, while the others train."""
    model = lcpatch.apply(build(), "sf", mode="train", **SHORT["sf"]).train(rank != 1)
    with parallelize(model, layout="contiguous") as ranks:
        model(**ranks.shard(batch_of("whole")[0]))


def other_rates(rank: int) -> None:
    """Each has measured its own."""
    model = build()
    with parallelize(model, rates=Rates(bandwidth=1e9 + rank)) as ranks:
        model(**ranks.shard(batch_of("whole")[0]))
