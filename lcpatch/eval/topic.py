"""Topic retrieval: which topic did a long conversation begin with?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .task import Question, Sample, Task, Unit, room, tasks
from .text import Text
from .words import TOPICS

OPENING = (
    "Below is a record of our previous conversation on {} different topics. You are the ASSISTANT, and I am the USER. "
    "At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize each "
    "<TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start."
)
TURN = "\nUSER: I would like to discuss the topic of {}.\nASSISTANT: Sure! What about it are you interested in?\nUSER: "
CLOSING = (
    "\nNow the record ends. What is the {} topic(s) we discussed? Only give me the topic name. Do not summarize "
    "yourself. The topic is"
)
ORDINALS = ("first", "second", "third", "fourth", "fifth")


@tasks.register("topic")
@dataclass(frozen=True)
class TopicRetrieval(Task):
    """The first topic of a conversation about several; `rank` chooses among all of them.

    Source: LongChat's coarse-grained topic retrieval (LongEval), which LongLoRA (arXiv 2309.12307) and SinkLoRA (arXiv
    2406.05678) report. Departure: what is said about a topic is a piece of the local text.

    Args:
        topics: in the conversation; LongChat has one to about 600 tokens.
        asked: 1: the first topic, 2: the second, … up to 5.
    """

    title: ClassVar[str] = "the first topic of a long conversation"
    source: ClassVar[str] = "2309.12307"

    topics: int = 10
    asked: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        if not 2 <= self.topics <= len(TOPICS) or not 1 <= self.asked <= min(self.topics, len(ORDINALS)):
            raise ValueError(
                f"topics={self.topics} must be from 2 to {len(TOPICS)}, and asked={self.asked} one of them, at most "
                f"{len(ORDINALS)}"
            )

    def sample(self, text: Text, unit: Unit) -> Sample:
        """Topics in random order with equally much text about each."""
        rng = self.rng(unit)
        chosen = rng.sample(TOPICS, self.topics)
        choices = tuple(rng.sample(chosen, len(chosen)))
        question = Question(CLOSING.format(ORDINALS[self.asked - 1]), (chosen[self.asked - 1],), choices)
        turns = text.encode_all([TURN.format(topic) for topic in chosen])
        opening = text.encode(OPENING.format(self.topics))
        left = room(text, unit, [question], extra=len(opening) + sum(map(len, turns)))
        context = list(opening)
        for turn in turns:
            context += turn + text.haystack(rng, left // self.topics)
        return Sample(context, (question,))
