"""RULER's variable tracking: which variables hold a value, through assignments far apart."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

from .passkey import NONSENSE
from .task import Question, Sample, Task, Unit, hide, room, tasks
from .text import Text
from .words import numbers

OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text."
QUESTION = (
    "\nFind all variables that are assigned the value {0} in the text above. The variables that are assigned "
    "the value {0} are:"
)


@tasks.register("vt")
@dataclass(frozen=True)
class VariableTracking(Task):
    """`VAR ABCDE = 12345`, `VAR FGHIJ = VAR ABCDE`, …: every name that ends up with the value.

    Source: RULER, arXiv 2404.06654. Departure: four chains by default, whose names give `rank` its wrong choices.

    Args:
        chains: values, each with variables of its own.
        hops: assignments of a variable to the next one.
    """

    title: ClassVar[str] = "variable tracking"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    chains: int = 4
    hops: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        if self.chains < 2 or self.hops < 1:
            raise ValueError(f"chains={self.chains} must be at least 2, and hops={self.hops} at least 1")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Assignments in order, in nonsense."""
        rng = self.rng(unit)
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choices(string.ascii_uppercase, k=5))
            names += [] if name in names else [name]
        chains = [names[n :: self.chains] for n in range(self.chains)]
        values = numbers(rng, self.chains, 5)
        lines, depths = [], []
        for chain, value in zip(chains, values, strict=True):
            held = [value, *(f"VAR {name}" for name in chain)]
            lines += [f"VAR {name} = {what}." for name, what in zip(chain, held, strict=False)]
            depths += sorted(rng.random() for _ in chain)
        asked = rng.randrange(self.chains)
        question = Question(QUESTION.format(values[asked]), tuple(chains[asked]), tuple(rng.sample(names, len(names))))
        opening, nonsense = text.encode(OPENING), text.encode(NONSENSE)
        size = room(text, unit, [question], extra=len(opening))
        hay = (nonsense * (size // len(nonsense) + 1))[:size]
        return Sample(opening + hide(text, hay, lines, depths, size), (question,))
