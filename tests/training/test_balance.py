"""The balanced scheduler: properties of any batch, and how near to the bound it comes on mixes like ByteScale's."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcpatch.core.errors import ParallelError
from lcpatch.training.parallel.balance import Costs, MicroBatch, Plan, check_host, lower_bound, offload_ratio, plan

COSTS = Costs(square=1.0, linear=65536.0)  # quadratic and linear parts equal at 64K, as for a 7B model


@st.composite
def batches(draw) -> tuple[list[int], int, int]:
    ranks, capacity = draw(st.integers(1, 40)), draw(st.integers(1, 5000))
    most = ranks * capacity
    short = st.integers(1, min(most, 600))
    lengths = draw(st.lists(st.one_of(short, short, short, st.integers(1, most)), max_size=60))
    return lengths, ranks, capacity


@settings(max_examples=100)
@given(batches())
def test_every_sequence_once_and_nothing_overflows(batch):
    lengths, ranks, capacity = batch
    found = plan(lengths, ranks, capacity, COSTS)
    assert sorted(n for b in found.batches for n in b.sequences) == list(range(len(lengths)))
    for b in found.batches:
        assert b.ranks == tuple(sorted(set(b.ranks)))
        assert set(b.ranks) <= set(range(ranks))
        tokens = sum(lengths[n] for n in b.sequences)
        if len(b.ranks) == 1:
            assert b.tokens == tokens <= capacity
        else:
            assert len(b.sequences) == 1
            assert len(b.ranks) <= tokens  # none without a token
            assert b.tokens == -(-tokens // len(b.ranks)) <= capacity
        assert b.seconds == pytest.approx(sum(COSTS.seconds(lengths[n]) for n in b.sequences) / len(b.ranks))
    assert found.makespan() >= lower_bound(lengths, ranks, COSTS) * (1 - 1e-9)
    assert [len(found.of(rank)) for rank in range(ranks)] == found.counts()


@settings(max_examples=60)
@given(batches())
def test_no_sequence_has_ranks_that_neither_memory_nor_time_asks_for(batch):
    """One rank fewer would not hold it, or would make it the last to finish."""
    lengths, ranks, capacity = batch
    bound = lower_bound(lengths, ranks, COSTS)
    for b in plan(lengths, ranks, capacity, COSTS).batches:
        width = len(b.ranks)
        if width > 1:
            n = lengths[b.sequences[0]]
            assert n > capacity * (width - 1) or COSTS.seconds(n) / (width - 1) > bound * (1 - 1e-9)


def mix(size: int, seed: int, longest: int = 2 << 20) -> list[int]:
    """Most are short, a few of 2M tokens."""
    rng = random.Random(seed)

    def between(a: int, b: int) -> int:
        return int(math.exp(rng.uniform(math.log(a), math.log(b))))

    kinds = [(100, 4096), (4096, 65536), (65536, 1 << 19), (1 << 19, longest)]
    return [between(*kinds[k]) for k in rng.choices(range(4), [80, 19, 0.95, 0.05], k=size)]


@pytest.mark.parametrize(
    ("ranks", "size"), [(8, 2000), (64, 5000), (256, 2000), (1024, 2000), (1024, 20_000), (1024, 100_000)]
)
def test_near_the_bound_on_a_mix_like_bytescales(ranks: int, size: int):
    lengths = mix(size, seed=ranks)
    start = time.process_time()
    found = plan(lengths, ranks, 262_144, COSTS)
    assert time.process_time() - start < 10
    assert found.makespan() <= 1.05 * lower_bound(lengths, ranks, COSTS)
    counts = found.counts()
    assert min(counts) >= 1
    assert max(counts) > min(counts)  # unequal on purpose


def test_the_bound_sees_a_bad_plan():
    lengths = mix(500, seed=1)
    alone = [MicroBatch((n,), (n % 8,), s, COSTS.seconds(s)) for n, s in enumerate(lengths)]
    assert Plan(tuple(alone), 8).makespan() > 1.05 * lower_bound(lengths, 8, COSTS)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ParallelError, match="sequence 1 has 4001 tokens; 4 ranks of 1000 tokens hold 1 to 4000"):
        plan([5, 4001], 4, 1000)
    with pytest.raises(ParallelError, match="sequence 0 has 0 tokens"):
        plan([0], 4, 1000)
    assert plan([], 4, 1000).makespan() == 0


class FSDPLinear(nn.Linear):
    """Stands for what fully_shard makes of a module's class."""


def test_unequal_counts_are_refused_under_fsdp():
    uneven = Plan((MicroBatch((0,), (0,), 5, 1.0),), 2)
    with pytest.raises(ParallelError, match="0 to 1 micro-batches, but under FSDP"):
        check_host(uneven, nn.Sequential(FSDPLinear(2, 2)))
    check_host(uneven, nn.Linear(2, 2))
    check_host(Plan((MicroBatch((0,), (0, 1), 5, 1.0),), 2), FSDPLinear(2, 2))


@settings(max_examples=100)
@given(st.integers(1, 1 << 20), st.floats(0, 1e4), st.integers(3, 80))
def test_offload_ratio_is_the_least_that_saves_ranks(tokens: int, bandwidth: float, layers: int):
    costs = Costs(1e-6, 1e-3, 0.0, bytes_per_token=2.0, bandwidth=bandwidth, num_layers=layers)
    r, ranks = offload_ratio(tokens, 10_000, costs)
    act, room = costs.activations(tokens), costs.activations(10_000)

    def needs(share: float) -> int:
        return max(1, math.ceil((2 * act + (1 - share) * (layers - 2) * act) / (layers * room) - 1e-6))

    assert 0 <= r <= 1
    assert r * act <= costs.seconds(tokens) * bandwidth * (1 + 1e-9)  # it travels while the layer computes
    assert ranks == needs(r)
    allowed = min(1.0, costs.seconds(tokens) * bandwidth / act)
    assert all(needs(allowed * n / 50) >= ranks for n in range(51))
    if r > 1e-6:
        assert needs(r * 0.999) > ranks or needs(0) > ranks
