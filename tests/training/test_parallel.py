"""Context parallelism on real gloo processes: what ranks compute together is what one process computes."""

from __future__ import annotations

import re

import pytest
import torch
from models import SHORT
from parallel_cases import dying_rank, other_batch, run_all, run_others, wrong_shard
from parallel_chunk_cases import other_text, run_chunks, run_with_chunks
from parallel_plan_cases import other_mode, other_rates
from world import run_world

SF = {"method": "sf", **SHORT["sf"]}
S2 = {"method": "s2", "layers": "every_2", **SHORT["s2"]}
SHIFT = {"method": "shift"}
SINK = {"method": "sink", **SHORT["sink"], "sinks": "logit:-1"}
PREFIX = {**SINK, "sinks": "prefix:2:0"}

CASES = [
    {"batch": "packed", "patch": SF, "strategy": "halo", "lora": True, "checkpoint": True},
    {"batch": "left", "patch": S2, "strategy": "auto"},
    {"batch": "whole", "patch": SF, "strategy": "halo", "dtype": torch.float32},
    {"batch": "whole", "strategy": "ring", "lora": True, "checkpoint": True},
    {"batch": "packed", "strategy": "tokenring"},
    {"batch": "right", "strategy": "lightseq", "layout": "contiguous"},
]
MORE = [
    {"batch": "whole", "patch": S2, "strategy": ["halo"], "dtype": torch.bfloat16},
    {"batch": "flattened", "patch": SHIFT, "strategy": "halo", "checkpoint": True},
    {"batch": "packed", "patch": SINK, "strategy": "halo"},
    {"batch": "left", "patch": PREFIX, "strategy": ["ulysses", "halo"]},
    {"batch": "left", "patch": S2, "strategy": ["lightseq", "halo"], "lora": True},
    {"batch": "right", "patch": S2, "strategy": ["ulysses", "halo"], "family": "mistral"},
    {"batch": "packed", "strategy": "auto", "layout": "contiguous"},
    # Gemma sums the gradients of its norms in fp32 whatever the model is.
    {"batch": "packed", "family": "gemma2", "strategy": "auto", "dtype": torch.float32},
    {
        "batch": "whole",
        "family": "gemma3_text",
        "strategy": ["ring", "halo"],
        "layout": "head_tail",
        "dtype": torch.float32,
    },
    {"batch": "packed", "family": "gpt_oss", "strategy": "auto"},
    {"batch": "left", "family": "qwen3", "patch": SF, "strategy": "halo", "layout": "head_tail"},
    {"batch": "whole", "family": "qwen2", "strategy": "tokenring", "dtype": torch.float32, "checkpoint": True},
]

TUNED = [{"lora": lora, "checkpoint": checkpoint} for lora in (False, True) for checkpoint in (False, True)]
MATRIX = [
    {"batch": "packed", "family": "mistral", "strategy": strategy, **tuned}
    for strategy in ("halo", "ring", "lightseq", "tokenring", "ulysses")
    for tuned in TUNED
]

CHUNKS = [
    {"batch": "packed", "patch": S2, "strategy": ["tokenring", "halo"], "size": 29, "lora": True, "checkpoint": True},
    {"batch": "whole", "strategy": "auto", "size": 17, "dtype": torch.float32},
]
MORE_CHUNKS = [
    {"batch": "whole", "strategy": "tokenring", "size": 16, "lora": True, "checkpoint": True},
    {"batch": "whole", "strategy": "ring", "size": 41},  # and one token, too few to share
    {"batch": "answer", "patch": SF, "strategy": "auto", "size": 16},  # most parts of most chunks have no label
    {"batch": "answer", "strategy": "tokenring", "size": 16, "checkpoint": True},
    {"batch": "left", "patch": SF, "strategy": "auto", "size": 8, "checkpoint": True},
    {"batch": "right", "patch": S2, "strategy": "auto", "size": 31, "family": "mistral", "lora": True},
    {"batch": "packed", "patch": SINK, "strategy": "auto", "size": 25},
    {"batch": "left", "patch": PREFIX, "strategy": "auto", "size": 37},
    {"batch": "packed", "patch": {"method": "shift", **SHORT["shift"]}, "strategy": "halo", "size": 22},
    {"batch": "packed", "strategy": "tokenring", "size": 4, "family": "qwen3"},
    {"batch": "whole", "strategy": "auto", "size": 500},  # a single chunk
    {"batch": "packed", "patch": S2, "strategy": "auto", "size": 20, "dtype": torch.bfloat16},
    # Gemma sums the gradients of its norms in fp32 whatever the model is.
    {"batch": "whole", "family": "gemma3_text", "strategy": "auto", "size": 16, "dtype": torch.float32, "lora": True},
    {"batch": "whole", "family": "gpt_oss", "strategy": "auto", "size": 16},
]
CHUNK_MATRIX = [
    {"batch": "packed", "strategy": strategy, "patch": patch, "size": 18, **tuned}
    for strategy, patch in (("halo", SF), ("ring", None), ("tokenring", None))
    for tuned in TUNED
]


def assert_right(answers: list) -> None:
    for answer in answers:
        assert isinstance(answer, dict), answer
        count, failures = answer["attention"]
        assert count > 100
        assert not failures, "\n".join(failures[:5])
        assert not answer["training"], "\n".join(answer["training"])
        assert not answer["unchanged"], answer["unchanged"]
        assert not answer.get("chunks"), "\n".join(answer["chunks"])
        assert answer.get("control", 1.0) > 1e-3


def test_two_ranks_compute_what_one_does():
    assert_right(run_world(2, run_with_chunks, [(4, 2)], CASES, CHUNKS))


@pytest.mark.slow
def test_two_ranks_on_every_shape():
    assert_right(run_world(2, run_all, [(8, 1), (4, 4), (9, 3)], CASES + MORE + MATRIX, timeout=900))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_more_ranks(num_ranks: int):
    """An odd number, in which lightseq never idles; and four, of which some have no token of some documents."""
    assert_right(run_world(num_ranks, run_all, [(8, 2), (6, 6)], CASES + MORE, timeout=900))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_chunks_inside_a_rank(num_ranks: int):
    """SeCO by every strategy that serves it: attention alone to the byte, and whole models."""
    cases = CHUNKS + MORE_CHUNKS + (CHUNK_MATRIX if num_ranks == 2 else [])
    for answer in run_world(num_ranks, run_chunks, [(8, 2), (6, 6)], cases, timeout=900):
        assert isinstance(answer, dict), answer
        count, failures = answer["attention"]
        assert count > 100
        assert not failures, "\n".join(failures[:5])
        assert not answer["chunks"], "\n".join(answer["chunks"])
        assert answer["spaco"] <= 1e-12
        assert answer["memory"] == answer["two kappa"]
        assert not answer["rehearsed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_shard, "rank 1 was given 2 rows of 21 tokens; its part of the batch is 2 of 22"),
        (other_batch, "rank 1 holds a part of another batch than rank 0"),
        (other_text, "rank 1 holds a part of another batch than rank 0"),
        (other_mode, "rank 1 runs another pattern than rank 0"),
        (other_rates, "or reckons with other rates"),
    ],
)
def test_what_does_not_fit_ends_every_rank(function, message):
    for answer in run_world(2, function):
        assert answer.startswith("ParallelError")
        assert message in answer


@pytest.mark.slow
def test_a_rank_that_dies_is_named():
    first, second, third = run_world(3, dying_rank, timeout=120)
    assert second is None
    for answer in (first, third):
        assert answer.startswith("ParallelError"), answer
        assert re.search(r"rank 1 is gone|ranks .*\b1\b.* are gone", answer), answer  # who notices leaves, too


@pytest.fixture(scope="module")
def others() -> list:
    answers = run_world(4, run_others)
    for answer in answers:
        assert isinstance(answer, dict), answer
    return answers


@pytest.mark.slow
def test_a_balanced_batch_has_the_gradients_of_plain_data_parallelism(others):
    """Long sequences on several ranks, short ones packed on one, unequal numbers of micro-batches."""
    assert [answer["balanced"] for answer in others] == [[]] * 4


@pytest.mark.slow
def test_torchs_own_ring_computes_the_same_and_sends_what_we_say_it_does(others):
    rings = [answer["ring"] for answer in others]
    for ring in rings:
        assert ring["error"] <= ring["allowed"]
        assert ring["theirs"] == ring["counted"]
        assert ring["ours"] <= ring["theirs"]
    assert sum(ring["ours"] for ring in rings) == 0.75 * sum(ring["theirs"] for ring in rings)
