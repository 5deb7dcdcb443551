"""Tasks over a data set's records: from files here, or from the Hub through `datasets`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .task import Question, Sample, Task, Unit, room
from .text import Text

LETTERS = "ABCD"


@dataclass(frozen=True)
class RecordTask(Task):
    """Base of the tasks over records: one question a record, its context cut in the middle to fit the length.

    Args:
        subset: which of the data set's tasks.
        data: a `.jsonl` file, or a folder with `SUBSET.jsonl` in it, in the data set's own format; None: from the Hub.
        max_records: the first so many; 0: all.
    """

    only_plan: ClassVar[tuple[str, ...]] = ("max_records",)
    needs_data: ClassVar[bool] = True
    subsets: ClassVar[tuple[str, ...]]
    hub: ClassVar[dict[str, str]]

    subset: str = ""
    data: str | None = None
    max_records: int = 50

    def __post_init__(self) -> None:
        """Check the subset."""
        if not self.subset:
            object.__setattr__(self, "subset", self.subsets[0])
        if self.subset not in self.subsets:
            raise ValueError(f"{self.name} has no subset {self.subset!r}; choices: {', '.join(self.subsets)}")
        if self.max_records < 0:
            raise ValueError(f"max_records={self.max_records} must be at least 0")

    def ask(self, record: dict[str, Any]) -> tuple[str, str, Question]:
        """What comes before the context, the context, and the question."""
        raise NotImplementedError

    def units(self, text: Text, length: int, seeds: Sequence[int]) -> Iterator[Unit]:
        """One a record; nothing is random, so seeds change nothing."""
        count = len(self._records())
        for number in range(min(self.max_records or count, count)):
            yield Unit(length, 0, {"record": number})

    def sample(self, text: Text, unit: Unit) -> Sample:
        """The record's context, without its middle if it is too long."""
        number = unit.facts["record"]
        try:
            before, context, question = self.ask(self._records()[number])
        except KeyError as error:
            raise ValueError(
                f"record {number + 1} of {self.subset} has no field {error}; is it {self.name}'s?"
            ) from error
        opening, ids = text.encode(before), text.encode(context)
        left = room(text, unit, [question], extra=len(opening))
        if len(ids) > left:
            ids = ids[: left // 2] + ids[len(ids) - (left - left // 2) :]
        return Sample(opening + ids, (question,))

    def _records(self) -> list[dict[str, Any]]:
        return _read(self.data, self.subset) if self.data else _download(self.subset, **self.hub)


def choice(prompt: str, options: Sequence[str], right: str) -> Question:
    """A question with lettered options."""
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    letters = tuple(LETTERS[: len(options)])
    return Question(f"{prompt}{listed}\nThe letter of the right answer is", (right,), letters, "first_letter")


@functools.lru_cache(maxsize=4)
def _read(data: str, subset: str) -> list[dict[str, Any]]:
    path = Path(data)
    path = path / f"{subset}.jsonl" if path.is_dir() else path
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is not a record but {type(record).__name__}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty; download {subset}.jsonl again")
    return records


@functools.lru_cache(maxsize=4)
def _download(subset: str, repository: str, split: str = "", name: str = "") -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{repository} is loaded with `datasets`: pip install 'lcpatch[eval]', or give its files with --data FOLDER"
        ) from error
    found = datasets.load_dataset(repository, *([subset] if name == "subset" else []), split=split or subset)
    return [dict(record) for record in found]
