"""A number hidden in nonsense, asked for at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .task import Question, Sample, Task, Unit, grid, hide, room, tasks
from .text import Text

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
NONSENSE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"


@tasks.register("passkey")
@dataclass(frozen=True)
class Passkey(Task):
    """Find the pass key; right if the first number in the answer is exactly it.

    Source: landmark attention's prompt (arXiv 2305.16300), as LongLoRA and SinkLoRA use it. Departure: a grid of depths
    instead of random ones.

    Args:
        depths: places from the first to the last, evenly spread.
        digits: of the pass key.
        choices: numbers that `rank` chooses from.
    """

    title: ClassVar[str] = "a number hidden in nonsense"
    source: ClassVar[str] = "2305.16300"

    depths: int = 5
    digits: int = 5
    choices: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        if self.depths < 1 or self.digits < 1 or not 2 <= self.choices <= 9 * 10 ** (self.digits - 1):
            raise ValueError(
                f"depths={self.depths} and digits={self.digits} must be at least 1, and choices={self.choices} from 2 "
                "to what that many digits can tell apart"
            )

    def units(self, text: Text, length: int, seeds: Sequence[int]) -> Iterator[Unit]:
        """Every depth with every seed."""
        for depth in grid(self.depths):
            for seed in seeds:
                yield Unit(length, seed, {"depth": depth})

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Nonsense around one number."""
        rng = self.rng(unit)
        lowest = 10 ** (self.digits - 1)
        keys = [str(key) for key in rng.sample(range(lowest, 10 * lowest), self.choices)]
        right = keys[0]
        rng.shuffle(keys)
        question = Question(QUESTION, (right,), tuple(keys))
        opening, nonsense = text.encode(OPENING), text.encode(NONSENSE)
        size = room(text, unit, [question], extra=len(opening))
        hay = (nonsense * (size // len(nonsense) + 1))[:size]
        hidden = hide(text, hay, [NEEDLE.format(right)], [unit.facts["depth"]], size)
        return Sample(opening + hidden, (question,))

    def match(self, written: str, answers: Sequence[str]) -> float:
        """Exact: the first number that was written."""
        found = re.search(r"\d+", written)
        return float(found is not None and found[0] == answers[0])
