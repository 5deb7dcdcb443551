"""RULER's harder needles: many keys, many values to a key, many keys asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from .needle import NEEDLE, QUESTION
from .task import Question, Sample, Task, Unit, hide, room, tasks
from .text import Text
from .words import keys, numbers

QUESTION_ALL = (
    "\nWhat are all the special magic numbers for {0} mentioned in the text? The special magic numbers for {0} "
    "mentioned in the text are:"
)


@tasks.register("niah_multikey")
@dataclass(frozen=True)
class MultiKey(Task):
    """Many needles, of which one is asked for.

    Source: RULER, arXiv 2404.06654 (niah_multikey_1; with `filled`, _2 and _3: the haystack itself is needles).

    Args:
        keys: needles in the text; the numbers of all are what `rank` chooses from, up to 10.
        filled: as many needles as fit, and no text.
    """

    title: ClassVar[str] = "one of many similar needles"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    keys: int = 4
    filled: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.keys < 2:
            raise ValueError(f"keys={self.keys} must be at least 2")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Needles anywhere in the text; the one that is asked for is any of them."""
        rng = self.rng(unit)
        count = self.keys if not self.filled else max(self.keys, unit.length // 8)  # more than fit
        pairs = list(zip(keys(rng, count), numbers(rng, count), strict=True))
        if self.filled:
            lines = text.encode_all([f" {NEEDLE.format(*pair)}" for pair in pairs])
            size = room(text, unit, [self._question(pair, pairs, rng) for pair in pairs[:20]])
            pairs = pairs[: _fitting([len(line) for line in lines], size)]
            if len(pairs) < self.keys:
                raise ValueError(f"{self.keys} needles do not fit")
            question = self._question(rng.choice(pairs), pairs, rng)
            return Sample([token for line in lines[: len(pairs)] for token in line], (question,))
        question = self._question(rng.choice(pairs), pairs, rng)
        size = room(text, unit, [question])
        needles = [NEEDLE.format(*pair) for pair in pairs]
        depths = [rng.random() for _ in needles]
        return Sample(hide(text, text.haystack(rng, size), needles, depths, size), (question,))

    @staticmethod
    def _question(pair: tuple[str, str], pairs: list[tuple[str, str]], rng: random.Random) -> Question:
        others = [value for _, value in pairs if value != pair[1]]
        choices = [pair[1], *rng.sample(others, min(9, len(others)))]
        rng.shuffle(choices)
        return Question(QUESTION.format(pair[0]), (pair[1],), tuple(choices))


@tasks.register("niah_multivalue")
@dataclass(frozen=True)
class MultiValue(Task):
    """One key with several values, all of which are asked for.

    Source: RULER, arXiv 2404.06654. Departure: as many needles again, of another key, give `rank` its wrong choices.

    Args:
        values: of the key.
    """

    title: ClassVar[str] = "every number of one key"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    values: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        if self.values < 1:
            raise ValueError(f"values={self.values} must be at least 1")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Needles anywhere in the text."""
        rng = self.rng(unit)
        asked, other = keys(rng, 2)
        found = numbers(rng, 2 * self.values)
        right, choices = tuple(found[: self.values]), rng.sample(found, len(found))
        question = Question(QUESTION_ALL.format(asked), right, tuple(choices))
        size = room(text, unit, [question])
        needles = [NEEDLE.format(asked if value in right else other, value) for value in choices]
        depths = [rng.random() for _ in needles]
        return Sample(hide(text, text.haystack(rng, size), needles, depths, size), (question,))


@tasks.register("niah_multiquery")
@dataclass(frozen=True)
class MultiQuery(Task):
    """Several needles, each asked for over one reading of the context.

    Source: RULER, arXiv 2404.06654. Departure: one question a key instead of all keys in one.

    Args:
        queries: needles, and questions.
    """

    title: ClassVar[str] = "several needles, each asked for"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    queries: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        if self.queries < 2:
            raise ValueError(f"queries={self.queries} must be at least 2")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Needles anywhere in the text."""
        rng = self.rng(unit)
        pairs = list(zip(keys(rng, self.queries), numbers(rng, self.queries), strict=True))
        choices = tuple(rng.sample([value for _, value in pairs], len(pairs)))
        questions = tuple(Question(QUESTION.format(key), (value,), choices) for key, value in pairs)
        size = room(text, unit, questions)
        needles = [NEEDLE.format(*pair) for pair in pairs]
        depths = [rng.random() for _ in needles]
        return Sample(hide(text, text.haystack(rng, size), needles, depths, size), questions)


def _fitting(sizes: list[int], room: int) -> int:
    """How many of the first pieces fit."""
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if total > room:
            return number
    return len(sizes)
