"""Questions about a real text, whose answers stand in it: RULER's question answering, without a data set."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .task import Question, Sample, Task, Unit, room, tasks
from .text import Text

OPENING = "Answer from the text.\n"
QUESTION = "\nComplete this sentence as it stands in the text above: {}"
SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z][^.!?]{60,300}[.!?]")
PLACES = 50
"""Pieces of the text that are tried before there are too few sentences in it."""
WORD = re.compile(r"[A-Za-z]{6,}")


@tasks.register("qa")
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The word that follows the beginning of a sentence of the text.

    Source: RULER's QA, arXiv 2404.06654. Departure: RULER hides paragraphs of SQuAD; here questions are made from the
    text itself, so that it needs no data set. The wrong choices are answers to other sentences of the same context.

    Args:
        questions: over one reading of the context.
    """

    title: ClassVar[str] = "questions about a real text"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    questions: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        if self.questions < 2:
            raise ValueError(
                f"questions={self.questions} must be at least 2: the others' answers are the wrong choices"
            )

    def sample(self, text: Text, unit: Unit) -> Sample:
        """A piece of the text and sentences from anywhere in it."""
        rng = self.rng(unit)
        opening = text.encode(OPENING)
        longest = Question(QUESTION.format("word " * 60), ("abcdefgh",))
        size = room(text, unit, [longest], extra=len(opening))
        for _ in range(PLACES):
            context = text.haystack(rng, size)
            found = self._cut(rng, text.decode(context))
            if len(found) == self.questions:
                break
        else:
            raise ValueError(
                f"{size} tokens of {text.name} hold fewer than {self.questions} sentences to ask about: ask for longer "
                "--lengths or fewer --questions, or give prose with --text"
            )
        choices = tuple(rng.sample(list(found), len(found)))
        questions = tuple(Question(QUESTION.format(start), (word,), choices) for word, start in found.items())
        return Sample(opening + context, questions)

    def _cut(self, rng: random.Random, written: str) -> dict[str, str]:
        """Answers and the beginnings of their sentences, as many as are asked for or as there are."""
        found: dict[str, str] = {}
        for sentence in rng.sample(sentences := SENTENCE.findall(written), len(sentences)):
            words = [m for m in WORD.finditer(sentence) if m.start() > 40]
            if words and (word := rng.choice(words))[0] not in found and written.count(sentence) == 1:
                found[word[0]] = " ".join(sentence[: word.start()].split())
            if len(found) == self.questions:
                break
        return found

    def match(self, written: str, answers: Sequence[str]) -> float:
        """Exact: the first word that was written."""
        found = re.search(r"[A-Za-z]+", written)
        return float(found is not None and found[0] == answers[0])
