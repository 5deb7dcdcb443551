"""Needles in a haystack of real text, each asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .task import Question, Sample, Task, Unit, grid, hide, room, tasks
from .text import Text
from .words import keys, numbers

NEEDLE = "One of the special magic numbers for {} is: {}."
QUESTION = "\nWhat is the special magic number for {0} mentioned in the text? The special magic number for {0} is:"


@tasks.register("needle")
@dataclass(frozen=True)
class Needle(Task):
    """Sentences with a number each, hidden in real text.

    Source: Kamradt's needle in a haystack, with the needles of RULER (arXiv 2404.06654). Departure: the haystack is the
    text that perplexity is measured on, from a random place.

    Args:
        depths: places of the first needle from the first to the last, evenly spread.
        needles: how many; those after the first lie anywhere. Each is asked for, over one reading of the context.
        choices: numbers that `rank` chooses from.
    """

    title: ClassVar[str] = "sentences hidden in real text"
    source: ClassVar[str] = "2404.06654"

    depths: int = 5
    needles: int = 1
    choices: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        if self.depths < 1 or self.needles < 1 or self.choices < max(2, self.needles):
            raise ValueError(
                f"depths={self.depths} and needles={self.needles} must be at least 1, and choices={self.choices} at "
                "least 2 and not less than the needles"
            )

    def units(self, text: Text, length: int, seeds: Sequence[int]) -> Iterator[Unit]:
        """Every depth with every seed."""
        for depth in grid(self.depths):
            for seed in seeds:
                yield Unit(length, seed, {"depth": depth})

    def sample(self, text: Text, unit: Unit) -> Sample:
        """A piece of the text with the needles in it."""
        rng = self.rng(unit)
        names, choices = keys(rng, self.needles), numbers(rng, self.choices)
        values = choices[: self.needles]
        rng.shuffle(choices)
        pairs = list(zip(names, values, strict=True))
        questions = [Question(QUESTION.format(name), (value,), tuple(choices)) for name, value in pairs]
        size = room(text, unit, questions)
        depths = [unit.facts["depth"], *(rng.random() for _ in pairs[1:])]
        needles = [NEEDLE.format(*pair) for pair in pairs]
        return Sample(hide(text, text.haystack(rng, size), needles, depths, size), tuple(questions))
