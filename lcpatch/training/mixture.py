"""A mixture of data sets in fixed proportions, as conversations for SFT.

`SINKLORA` are the published proportions of SinkLoRA's training data (arXiv 2406.05678, section 4), of which nothing was
released: 28,000 rows, 44 % Natural Questions, 27 % RedPajama, 18 % book summaries, 11 % LongQA. How each becomes a
conversation is not published either; `Component` says how it is done here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.disk import replacing, why_unwritten
from ..core.errors import TrainingError
from .sources import Record, sources

SINKLORA_ROWS = 28_000
CONTINUED = 2048
"""Characters of a plain text that the assistant is to write; what is before them is the user's."""


@dataclass(frozen=True)
class Component:
    """One part of a mixture.

    Args:
        share: of all rows, in percent.
        convert: a record to (what the user says, what the assistant answers), or None for a record that has no answer.
        fields: what a record needs, for messages: any one of these sets.
    """

    share: int
    convert: Callable[[Record], tuple[str, str] | None]
    fields: str


def _question(record: Record) -> tuple[str, str] | None:
    """Natural Questions: the page, then the question; the short answer if there is one, else the long one."""
    context = _first(record, "document", "context", "document_text")
    question = _first(record, "question", "question_text", "query")
    answer = _first(record, "short_answer", "answer", "answers", "long_answer")
    if not context or not question or not answer:
        return None
    return f"{context}\n\nAnswer from the text above: {question}", answer


def _continuation(record: Record) -> tuple[str, str] | None:
    """RedPajama: a text without its last `CONTINUED` characters, to be continued."""
    text = _first(record, "text", "content")
    if not text or len(text) <= 2 * CONTINUED:
        return None
    return f"Continue this text.\n\n{text[:-CONTINUED]}", text[-CONTINUED:]


def _summary(record: Record) -> tuple[str, str] | None:
    """Book summaries: the chapter or book, then its summary."""
    text, summary = _first(record, "text", "chapter", "book", "document"), _first(record, "summary", "summary_text")
    return (f"{text}\n\nSummarize the text above.", summary) if text and summary else None


def _long_question(record: Record) -> tuple[str, str] | None:
    """LongQA: LongAlpaca's instruction and output, which hold the paper and the question."""
    asked, answer = (
        _first(record, "instruction", "question", "prompt"),
        _first(record, "output", "answer", "completion"),
    )
    if not asked or not answer:
        return None
    context = _first(record, "input", "context")
    return (f"{context}\n\n{asked}" if context else asked), answer


SINKLORA: dict[str, Component] = {
    "natural_questions": Component(44, _question, "document, question and short_answer (or long_answer)"),
    "redpajama": Component(27, _continuation, f"text of more than {2 * CONTINUED} characters"),
    "book_summaries": Component(18, _summary, "text (or chapter) and summary"),
    "longqa": Component(11, _long_question, "instruction and output, perhaps input"),
}


def mix(
    data: Mapping[str, Sequence[str]],
    out: Path,
    *,
    rows: int = SINKLORA_ROWS,
    seed: int = 0,
    components: Mapping[str, Component] = SINKLORA,
) -> dict[str, int]:
    """Write a JSONL file of `rows` conversations in the components' proportions, in random order.

    Each component's rows are drawn evenly from all that it has. The file appears whole or not at all.

    Args:
        data: files, folders or data sets on the Hub (`hub:NAME@SPLIT`), by component.
        out: the file to write.
        rows: of all components together.
        seed: of the draw and the order.
        components: by name.

    Returns:
        How many rows each component gave.

    Raises:
        ValueError: a component without data, or with too few usable records; the message says how many it needs. Or
            `out` is a folder.
        TrainingError: it could not be written.
    """
    if missing := [name for name in components if not data.get(name)]:
        raise ValueError(f"no data for {missing[0]!r}; the mixture needs {', '.join(components)}")
    if unknown := [name for name in data if name not in components]:
        raise ValueError(f"{unknown[0]!r} is no part of the mixture; it has {', '.join(components)}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, such as {out / 'mixture.jsonl'}")
    wanted = counts({name: component.share for name, component in components.items()}, rows)
    out.parent.mkdir(parents=True, exist_ok=True)  # better now than after all the reading
    rng = random.Random(seed)
    drawn: list[dict[str, Any]] = []
    for name, component in components.items():
        drawn += _draw(name, component, data[name], wanted[name], rng)
    rng.shuffle(drawn)
    try:
        with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn)
    except OSError as error:
        raise TrainingError(f"{out} could not be written ({why_unwritten(error, out.parent)}): make room") from error
    return wanted


def counts(shares: Mapping[str, int], rows: int) -> dict[str, int]:
    """How many of `rows` each share amounts to: whole numbers that add up, none more than 1 from its share.

    Raises:
        ValueError: a component would get no row.
    """
    total = sum(shares.values())
    exact = {name: rows * share / total for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    left = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    for name in left[: rows - sum(found.values())]:
        found[name] += 1
    if empty := [name for name, count in found.items() if count == 0]:
        raise ValueError(f"rows={rows} leave none for {empty[0]!r}: ask for more rows")
    return found


def _draw(
    name: str, component: Component, names: Sequence[str], count: int, rng: random.Random
) -> list[dict[str, Any]]:
    """`count` conversations out of all usable records, each as likely as any other (reservoir sampling)."""
    kept: list[tuple[str, str]] = []
    seen = usable = 0
    for record in _records(names):
        seen += 1
        if (pair := component.convert(record)) is None:
            continue
        usable += 1
        if len(kept) < count:
            kept.append(pair)
        elif (place := rng.randrange(usable)) < count:
            kept[place] = pair
    if usable < count:
        raise ValueError(
            f"{name} needs {count} records with {component.fields}; {usable} of the {seen} given ones have that: give "
            "more data, or ask for fewer rows"
        )
    return [
        {"source": name, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in kept
    ]


def _records(names: Sequence[str]) -> Iterator[Record]:
    for source in sources(names):
        yield from source.records()


def _first(record: Record, *names: str) -> str:
    """The first of these fields with text in it; of a list, its first entry."""
    for name in names:
        value = record.get(name)
        if isinstance(value, list):
            value = next((item for item in value if isinstance(item, str)), None)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""
