"""LongBench, both versions: real questions over long real texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .records import RecordTask, choice
from .task import Question, tasks

KINDS = {
    "f1": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    "rouge_l": ("gov_report", "qmsum", "multi_news", "samsum"),
    "any_of": ("trec", "passage_retrieval_en"),
    "first_number": ("passage_count",),
    "first_line": ("lcc", "repobench-p"),
}
PROMPTS = {
    "f1": ("Read the text and answer the question in as few words as possible.\n\n", "\n\nQuestion: {}\nAnswer:"),
    "rouge_l": ("Read the text and summarize it.\n\n", "\n\n{}\nSummary:"),
    "any_of": ("Read the examples or paragraphs.\n\n", "\n\n{}\nAnswer:"),
    "first_number": ("Some paragraphs come more than once. How many different ones are there?\n\n", "\n\n{}\nNumber:"),
    "first_line": ("Write the next line of this code.\n\n", "{}"),
}


@tasks.register("longbench")
@dataclass(frozen=True)
class LongBench(RecordTask):
    """The English and code tasks of LongBench.

    Source: arXiv 2308.14508; records of `zai-org/LongBench`. Departures: prompts of our own, one a kind of task, so
    scores compare between arms and not with published tables (`lm-eval` has tasks with its prompts: see
    `lcpatch.eval.harness`); code is compared with `difflib`; the Chinese tasks are left out.

    Args:
        subset: which task.
        data: a `.jsonl` file, or a folder with `SUBSET.jsonl` in it, in the data set's own format; None: from the Hub.
        max_records: the first so many; 0: all.
    """

    title: ClassVar[str] = "real questions over long texts"
    source: ClassVar[str] = "2308.14508"
    subsets: ClassVar[tuple[str, ...]] = tuple(name for names in KINDS.values() for name in names)
    hub: ClassVar[dict[str, str]] = {"repository": "zai-org/LongBench", "split": "test", "name": "subset"}

    def ask(self, record: dict[str, Any]) -> tuple[str, str, Question]:
        """By the kind of the subset; for classes, `rank` chooses among all of them."""
        kind = next(kind for kind, names in KINDS.items() if self.subset in names)
        before, after = PROMPTS[kind]
        classes = tuple(record.get("all_classes") or ())
        return (
            before,
            record["context"],
            Question(after.format(record["input"]), tuple(record["answers"]), classes, kind),
        )


@tasks.register("longbench_v2")
@dataclass(frozen=True)
class LongBenchV2(RecordTask):
    """Multiple-choice questions over texts of up to two million words.

    Source: arXiv 2412.15204; records of `zai-org/LongBench-v2`. Departure: a prompt of our own, without reasoning.

    Args:
        subset: how long the records are: "all", "short", "medium" or "long".
        data: a `.jsonl` file, or a folder with `SUBSET.jsonl` in it, in the data set's own format; None: from the Hub.
        max_records: the first so many; 0: all.
    """

    title: ClassVar[str] = "hard multiple choice over long texts"
    source: ClassVar[str] = "2412.15204"
    subsets: ClassVar[tuple[str, ...]] = ("all", "short", "medium", "long")
    hub: ClassVar[dict[str, str]] = {"repository": "zai-org/LongBench-v2", "split": "train"}

    def _records(self) -> list[dict[str, Any]]:
        records = super()._records()
        return [r for r in records if self.subset in ("all", r.get("length"))]

    def ask(self, record: dict[str, Any]) -> tuple[str, str, Question]:
        """Four options."""
        options = [record[f"choice_{letter}"] for letter in "ABCD"]
        question = choice(f"\n\nQuestion: {record['question']}", options, record["answer"])
        return "Read the text and answer the question.\n\n", record["context"], question
