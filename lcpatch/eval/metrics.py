"""How right a written answer is, in [0, 1], where "it contains the answer" does not say enough."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable

from .task import Question

ARTICLES = re.compile(r"\b(a|an|the)\b")


def f1(written: str, question: Question) -> float:
    """Words in common with the closest answer, as SQuAD counts them: case, punctuation and articles aside."""
    return max(_f1(_words(written), _words(answer)) for answer in question.answers)


def rouge_l(written: str, question: Question) -> float:
    """F1 of the longest common subsequence of words with the closest answer."""
    return max(_rouge(written.lower().split(), answer.lower().split()) for answer in question.answers)


def first_number(written: str, question: Question) -> float:
    """Whether the first number that was written is the answer's."""
    found, wanted = (re.search(r"-?\d+(\.\d+)?", text) for text in (written, question.answers[0]))
    return float(found is not None and wanted is not None and float(found[0]) == float(wanted[0]))


def first_letter(written: str, question: Question) -> float:
    """Whether the first A, B, C or D that stands alone is the answer."""
    found = re.search(r"\b[A-D]\b", written)
    return float(found is not None and found[0] == question.answers[0])


def first_line(written: str, question: Question) -> float:
    """How alike the first line of code and the answer's are, character by character."""
    lines = [line for line in written.strip().splitlines() if line.strip() and not line.startswith(("#", "//", "```"))]
    return max(difflib.SequenceMatcher(None, (lines or [""])[0], answer).ratio() for answer in question.answers)


def any_of(written: str, question: Question) -> float:
    """Whether one of the answers was written."""
    return float(any(answer.casefold() in written.casefold() for answer in question.answers))


METRICS: dict[str, Callable[[str, Question], float]] = {
    metric.__name__: metric for metric in (f1, rouge_l, first_number, first_letter, first_line, any_of)
}


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _rouge(found: list[str], wanted: list[str]) -> float:
    row = [0] * (len(wanted) + 1)
    for word in found:
        above = row
        row = [0]
        for n, other in enumerate(wanted):
            row.append(above[n] + 1 if word == other else max(above[n + 1], row[n]))
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0
