"""The time that one arm of a benchmark may take: a slow one must not cost the others theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

SAY_EVERY_S = 20


class TooSlow(Exception):
    """The time of an arm is up."""


class Clock(StoppingCriteria):
    """The time that an arm takes: says now and then how far it is, and ends it when its time is up."""

    def __init__(self, arm: str, limit_s: float, say: Callable[[str], None]) -> None:
        self.arm, self.limit_s, self.say = arm, limit_s, say
        self.start = self.said = time.perf_counter()
        self.never: torch.Tensor | None = None

    def check(self, where: str) -> None:
        """Raises TooSlow, with what was reached."""
        now = time.perf_counter()
        if now - self.start > self.limit_s:
            raise TooSlow(f"given up after {now - self.start:.0f} s, {where}")
        if now - self.said > SAY_EVERY_S:
            self.said = now
            self.say(f"{self.arm}: {now - self.start:.0f} s, {where}")

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Asked by `generate` after each token; never stops it."""
        self.check(f"{input_ids.shape[1]} tokens read and generated")
        if self.never is None or len(self.never) != len(input_ids):  # once: a kernel a token would be timed too
            self.never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.never
