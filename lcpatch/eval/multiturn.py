"""The second question: needles asked for one after the other in one conversation over one cached context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .needle import NEEDLE, QUESTION
from .task import Question, Sample, Task, Unit, hide, room, tasks
from .text import Text
from .words import keys, numbers


@tasks.register("multiturn")
@dataclass(frozen=True)
class MultiTurn(Task):
    """Needles asked for in turn: a question follows the one before and its right answer, over the same cache.

    Source: SCBench, arXiv 2412.10319, which finds that methods with less than O(n) memory fail from the second turn on:
    a cache that kept what the first question needed has dropped what the second needs.

    Args:
        turns: questions, and needles.
    """

    title: ClassVar[str] = "a second question over the same cache"
    source: ClassVar[str] = "2412.10319"

    turns: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        if self.turns < 2:
            raise ValueError(f"turns={self.turns} must be at least 2")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Needles anywhere in the text, asked for in random order."""
        rng = self.rng(unit)
        choices = numbers(rng, 10 + self.turns)
        pairs = list(zip(keys(rng, self.turns), choices, strict=False))
        choices = tuple(rng.sample(choices, len(choices)))
        questions = tuple(Question(QUESTION.format(key), (value,), choices) for key, value in pairs)
        size = room(text, unit, questions, turns=True)
        needles = [NEEDLE.format(*pair) for pair in pairs]
        depths = [rng.random() for _ in needles]
        return Sample(hide(text, text.haystack(rng, size), needles, depths, size), questions, turns=True)
