"""What a task is: samples that follow from (text, length, seed) alone, asked of every arm alike.

A task is one file that registers a frozen dataclass; its fields are its options, on the command line too. Most tasks
are a context with questions (`Task.sample`) and are scored in both of two ways:

    generate   the model answers greedily; the share of right answers in what it writes
    rank       the candidates' likelihoods; with k right ones among them, the share of right ones in the k likeliest.
               It needs no obedience, so that a small base model can be measured.
"""

from __future__ import annotations

import random
from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.registry import Registry

if TYPE_CHECKING:
    from .reader import Reader
    from .text import Text

tasks: Registry[type[Task]] = Registry("task", package="lcpatch.eval")

SPARE_TOKENS = 8
"""New tokens beyond the longest answer: room for a few words before it."""


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Args:
        prompt: what follows the context, up to where the answer begins.
        answers: what is right; several where all of them are asked for.
        candidates: what `rank` chooses from, the answers among them.
        metric: how `generate` is scored, a name in `metrics`; None: as the task does (`Task.match`).
    """

    prompt: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    metric: str | None = None

    @property
    def chance(self) -> float:
        """The rank score of a model that has not read the context."""
        return len(self.answers) / len(self.candidates) if self.candidates else 0.0


@dataclass(frozen=True)
class Sample:
    """A context and its questions; with `turns`, each question follows the one before and its answer."""

    context: list[int]
    questions: tuple[Question, ...]
    turns: bool = False


@dataclass(frozen=True)
class Unit:
    """One thing to measure: what its sample is built from.

    Args:
        length: tokens of context, question and answer together.
        seed: of everything random in it.
        facts: what else tells it apart, such as the depth.
    """

    length: int
    seed: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return "/".join([str(self.length), str(self.seed), *(f"{k}={v}" for k, v in self.facts.items())])


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    suite: ClassVar[str | None] = None
    only_plan: ClassVar[tuple[str, ...]] = ("depths",)
    scores_text: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def units(self, text: Text, length: int, seeds: Sequence[int]) -> Iterator[Unit]:
        """What is measured at one length."""
        for seed in seeds:
            yield Unit(length, seed)

    def sample(self, text: Text, unit: Unit) -> Sample:
        """The context and the questions of `unit`, the same at every call.

        Raises:
            ValueError: the length is too short for this task; the message says what it needs.
        """
        raise NotImplementedError

    def measure(self, text: Text, sample: Any, reader: Reader, score: str) -> dict[str, Any]:
        """Ask the arm behind `reader`."""
        from .ask import ask

        return ask(self, text, sample, reader, score)

    def match(self, written: str, answers: Sequence[str]) -> float:
        """How much of `answers` is in what the model wrote, in [0, 1]."""
        written = written.casefold()
        return sum(answer.strip().casefold() in written for answer in answers) / len(answers)

    def rng(self, unit: Unit) -> random.Random:
        """Random numbers that depend on the unit and the options only."""
        return random.Random(f"{self.name}/{sorted(self.cell_options().items())}/{unit.key}")

    def cell_options(self) -> dict[str, Any]:
        """The options that change what one unit measures; the others only say which units there are."""
        return {name: value for name, value in self.options().items() if name not in self.only_plan}

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def task_names(names: Sequence[str]) -> list[str]:
    """Names with every suite ("ruler") replaced by its tasks.

    Raises:
        UnknownNameError: neither a task nor a suite.
    """
    suites: dict[str, list[str]] = {}
    for name, cls in tasks.all().items():
        if cls.suite:
            suites.setdefault(cls.suite, []).append(name)
    found = [part for name in names for part in suites.get(name) or [tasks.get(name).name]]
    return list(dict.fromkeys(found))


def room(text: Text, unit: Unit, questions: Sequence[Question], *, turns: bool = False, extra: int = 0) -> int:
    """Tokens that are left for the context of `unit`, so that the longest question and its answer still fit.

    Raises:
        ValueError: none are left.
    """
    sizes = [len(text.encode(q.prompt + text.after)) + new_tokens(text, q) for q in questions]
    left = unit.length - len(text.opening) - extra - (sum(sizes) if turns else max(sizes))
    if left < 1:
        raise ValueError(f"length {unit.length} is too short for this task: it needs {unit.length - left + 1} tokens")
    return left


def new_tokens(text: Text, question: Question) -> int:
    """How many tokens the model may write for an answer."""
    return len(text.encode(" " + ", ".join(answer.strip() for answer in question.answers))) + SPARE_TOKENS


def hide(text: Text, context: list[int], needles: Sequence[str], depths: Sequence[float], room: int) -> list[int]:
    """`context` with each needle at its depth (0: first, 1: last), between two sentences, cut to `room` tokens.

    Raises:
        ValueError: the needles alone are longer than `room`.
    """
    encoded = text.encode_all([f" {needle}" for needle in needles])
    left = room - sum(map(len, encoded))
    if left < 0:
        raise ValueError(
            f"{len(needles)} needles take {room - left} tokens; {room} are there: ask for longer --lengths"
        )
    hay = context[:left]
    at = [0 if d <= 0 else left if d >= 1 else min(text.sentence_end(hay, round(d * left)), left) for d in depths]
    out: list[int] = []
    last = 0
    for place, needle in sorted(zip(at, encoded, strict=True), key=lambda pair: pair[0]):
        out += hay[last:place] + needle
        last = place
    return out + hay[last:]


def grid(count: int) -> list[float]:
    """`count` depths from 0 to 1, evenly spread; a single one is the middle."""
    return [0.5] if count == 1 else [round(n / (count - 1), 4) for n in range(count)]
