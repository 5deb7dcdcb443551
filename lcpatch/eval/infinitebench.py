"""InfiniteBench: questions over books, code and dialogues of more than 100K tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .records import LETTERS, RecordTask, choice
from .task import Question, tasks

PROMPTS = {
    "passkey": ("Find the important information in this text.\n\n", "\n\n{}\nThe pass key is", "first_number"),
    "number_string": ("Find the important information in this text.\n\n", "\n\n{}\nThe digits are", "any_of"),
    "kv_retrieval": ("Find the value of a key in this JSON object.\n\n", "\n\n{}\nThe value is", "any_of"),
    "longbook_qa_eng": ("Read the book and answer briefly.\n\n", "\n\nQuestion: {}\nAnswer:", "f1"),
    "longbook_sum_eng": ("Read the book and summarize it.\n\n", "\n\n{}\nSummary:", "rouge_l"),
    "longdialogue_qa_eng": ("One name in this dialogue is $$MASK$$.\n\n", "\n\n{}\nThe name is", "any_of"),
    "math_find": ("Read the list of numbers.\n\n", "\n\n{}\nAnswer:", "first_number"),
    "code_run": ("Read the functions.\n\n", "\n\n{}\nThe value is", "first_number"),
}
CHOICES = {
    "longbook_choice_eng": ("Read the book and answer the question.\n\n", "\n\nQuestion: {}"),
    "code_debug": ("One function of this code has an obvious error.\n\n", "\n\n{}"),
}


@tasks.register("infinitebench")
@dataclass(frozen=True)
class InfiniteBench(RecordTask):
    """The English, code and retrieval tasks of InfiniteBench.

    Source: arXiv 2402.13718; records of `xinrongzhang2022/InfiniteBench`. Departures: prompts of our own, so scores
    compare between arms and not with published tables; `math_calc` and the Chinese task are left out.

    Args:
        subset: which task.
        data: a `.jsonl` file, or a folder with `SUBSET.jsonl` in it, in the data set's own format; None: from the Hub.
        max_records: the first so many; 0: all.
    """

    title: ClassVar[str] = "questions over more than 100K tokens"
    source: ClassVar[str] = "2402.13718"
    subsets: ClassVar[tuple[str, ...]] = (*PROMPTS, *CHOICES)
    hub: ClassVar[dict[str, str]] = {"repository": "xinrongzhang2022/InfiniteBench"}

    def ask(self, record: dict[str, Any]) -> tuple[str, str, Question]:
        """By the subset; where there are options, the answer in the record is one of them in words."""
        answer = record["answer"]
        answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
        if self.subset in PROMPTS:
            before, after, metric = PROMPTS[self.subset]
            return before, record["context"], Question(after.format(record["input"]), answers, (), metric)
        before, after = CHOICES[self.subset]
        options = list(record["options"])
        right = next((LETTERS[n] for n, option in enumerate(options) if option in answers), answers[-1])
        return before, record["context"], choice(after.format(record["input"]), options, right)
