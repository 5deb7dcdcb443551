"""What decides whether a benchmark's result is right: nothing passes by a peer that went wrong."""

import math

import pytest
import torch

from lcpatch.bench.judge import between_backends, passes, relative_error

EXACT = torch.tensor([3.0, 4.0])
BROKEN = torch.tensor([math.nan, 4.0])


@pytest.mark.parametrize(
    ("error", "budget", "good"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (math.inf, math.inf, False), (0.0, math.inf, False), (math.nan, 1.0, False)],
)
def test_an_error_passes_within_a_budget_that_is_one(error, budget, good):
    assert passes(error, budget) is good


def test_relative_errors():
    assert relative_error(torch.tensor([3.0, 4.5]), EXACT) == pytest.approx(0.1)
    assert relative_error(BROKEN, EXACT) == math.inf


@pytest.mark.parametrize(
    ("ours", "other", "good"),
    [
        (EXACT + 0.1, EXACT + 0.1, True),
        (EXACT + 0.3, EXACT + 0.1, False),
        (BROKEN, EXACT, False),
        (EXACT, BROKEN, False),
    ],
)
def test_logits_beside_another_backends(ours, other, good):
    assert between_backends(ours, other, EXACT)["passed"] is good
