"""The logits of token t are those of the plain full forward under the same pattern, whatever way they were computed."""

from collections.abc import Callable

import pytest
import torch
from models import FAMILIES, SHORT, build, tokens
from noise import distance, model_budget
from schedules import GROWING, WHOLE, documents, plain
from torch import Tensor, nn

import lcpatch

FAST_FAMILIES = ("llama", "gemma2", "gpt_oss")
METHODS = tuple(lcpatch.methods())


def check(model: nn.Module, schedule: Callable, allowed: float, docs: list[Tensor]) -> None:
    with torch.no_grad():
        expected = [plain(model, doc) for doc in docs]
        got = schedule(model, docs)
    for doc, a, b in zip(docs, got, expected, strict=True):
        assert distance(a, b) <= allowed, f"document of {len(doc)} tokens"


def check_pattern_matters(model: nn.Module, dense: nn.Module, allowed: float) -> None:
    """Else every schedule would agree for the wrong reason."""
    ids = tokens()
    with torch.no_grad():
        assert distance(model(ids).logits, dense(ids).logits) > 1000 * allowed


def matrix() -> list:
    """Every family x method x schedule; slow but for a few families."""
    cases = []
    for family in FAMILIES:
        for method in METHODS:
            for schedule in WHOLE + GROWING:
                fast = family == "llama" or (family in FAST_FAMILIES and method in ("s2", "sf"))
                marks = [] if fast else [pytest.mark.slow]
                cases.append(
                    pytest.param(family, method, schedule, id=f"{family}-{method}-{schedule.__name__}", marks=marks)
                )
    return cases


@pytest.mark.parametrize(("family", "method", "schedule"), matrix())
def test_schedule(family: str, method: str, schedule: Callable):
    model = build(family)
    allowed = model_budget(model, tokens())
    dense = build(family)
    lcpatch.apply(model, method, mode="always", **SHORT.get(method, {}))
    check_pattern_matters(model, dense, allowed)
    check(model, schedule, allowed, documents())
