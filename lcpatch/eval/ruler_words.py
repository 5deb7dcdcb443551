"""RULER's aggregation: which words are the most common in a long list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .task import Question, Sample, Task, Unit, room, tasks
from .text import Text
from .words import coined

QUESTION_CWE = "\nWhat are the {0} most common words in the above list? The top {0} words that appear most often are:"
QUESTION_FWE = (
    "\nWhat are the three most frequently appeared words in the above coded text? The three most frequently appeared "
    "words are:"
)


@tasks.register("cwe")
@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which few words come often and many rarely: which are the few?

    Source: RULER, arXiv 2404.06654 (10 words 30 times, the others 3 times). Departures: coined words, so that none is
    known beforehand; and the counts shrink, keeping their ratio, where the length has no room for them.

    Args:
        common: how many words come often.
        ratio: how much more often they come.
    """

    title: ClassVar[str] = "the common words of a list"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    common: int = 10
    ratio: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        if self.common < 1 or self.ratio < 2:
            raise ValueError(f"common={self.common} must be at least 1, and ratio={self.ratio} at least 2")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """As many uncommon words as fit, at least three for each common one."""
        rng = self.rng(unit)
        fewest = 3 * self.common
        words = coined(rng, self.common + max(fewest, unit.length))  # more than fit
        often, rest = words[: self.common], words[self.common :]
        choices = tuple(rng.sample([*often, *rest[:fewest]], self.common + fewest))
        question = Question(QUESTION_CWE.format(self.common), tuple(often), choices)
        size = room(text, unit, [question])
        most = max(size // 8, fewest)
        probe = text.encode_all([f" {1 + n * most // fewest}. {word}" for n, word in enumerate(words[:fewest])])
        per_item = sum(map(len, probe)) / len(probe)
        items = int(size / per_item)
        for times in (3, 2, 1):
            uncommon = (items - self.common * self.ratio * times) // times
            if uncommon >= fewest:
                break
        else:
            needs = unit.length - size + per_item * (self.common * self.ratio + fewest)
            raise ValueError(
                f"it needs about {math.ceil(needs)} tokens; or take fewer --common words or a lower --ratio"
            )
        while True:
            listed = [*often * (self.ratio * times), *rest[:uncommon] * times]
            rng.shuffle(listed)
            context = text.encode("".join(f" {n}. {word}" for n, word in enumerate(listed, 1)))
            if len(context) <= size:
                return Sample(context, (question,))
            uncommon -= math.ceil((len(context) - size) / per_item / times)  # numbers take more tokens the longer
            if uncommon < fewest:
                raise ValueError(f"it needs about {unit.length + len(context) - size} tokens")


@tasks.register("fwe")
@dataclass(frozen=True)
class FrequentWords(Task):
    """A text of coined words whose counts fall by a power law: which three are the most frequent?

    Source: RULER, arXiv 2404.06654.

    Args:
        alpha: of the law: the word of rank k comes k^-alpha times as often as the first.
        words: how many different ones.
    """

    title: ClassVar[str] = "the frequent words of a coded text"
    source: ClassVar[str] = "2404.06654"
    suite: ClassVar[str] = "ruler"

    alpha: float = 2.0
    words: int = 50

    def __post_init__(self) -> None:
        """Check the options."""
        if self.alpha <= 1 or self.words < 12:
            raise ValueError(f"alpha={self.alpha} must be above 1, and words={self.words} at least 12")

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Words in random order, with noise ("...") between, as in RULER."""
        rng = self.rng(unit)
        words = coined(rng, self.words)
        question = Question(QUESTION_FWE, tuple(words[:3]), tuple(rng.sample(words[:12], 12)))
        size = room(text, unit, [question])
        tokens = [len(ids) for ids in text.encode_all([f" {word} ..." for word in words])]
        shares = [k**-self.alpha for k in range(1, self.words + 1)]
        scale = size / sum(share * count for share, count in zip(shares, tokens, strict=True))
        counts = [int(share * scale) for share in shares]
        if counts[2] <= counts[3]:
            raise ValueError("the third word would not be more frequent than the fourth: ask for longer --lengths")
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        listed += words[:1] * ((size - sum(map(int.__mul__, counts, tokens))) // tokens[0])  # what rounding left
        rng.shuffle(listed)
        return Sample(text.encode("".join(f" {word} ..." for word in listed))[:size], (question,))
