"""Ask a sample's questions, and say how right the answers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..patching.apply import unwrap
from .metrics import METRICS
from .task import Question, Sample, Task, new_tokens

if TYPE_CHECKING:
    from .reader import Reader
    from .text import Text


def ask(task: Task, text: Text, sample: Sample, reader: Reader, score: str) -> dict[str, Any]:
    """One row of results: the mean over the questions, and each question for itself."""
    stop = stop_tokens(reader.model, text.tokenizer)
    reader.read(text.opening + sample.context)
    held = reader.held()
    asked = []
    for number, question in enumerate(sample.questions):
        asked.append(_one(task, text, question, reader, score, stop))
        if sample.turns and number + 1 < len(sample.questions):
            reader.tell(turn(text, question))
    row: dict[str, Any] = {"tokens": len(text.opening) + len(sample.context), "cache_bytes": held}
    for name in ("rank", "generate"):
        if values := [one[name] for one in asked if name in one]:
            row[name] = sum(values) / len(values)
    row["chance"] = sum(question.chance for question in sample.questions) / len(sample.questions)
    return {**row, "questions": asked}


def _one(task: Task, text: Text, question: Question, reader: Reader, score: str, stop: set[int]) -> dict[str, Any]:
    ranked = question.candidates if score in ("rank", "both") else ()
    prompt, candidates = split(text, question.prompt + text.after, ranked)
    limit = new_tokens(text, question) if score in ("generate", "both") or not ranked else 0
    costs, written = reader.ask(prompt, candidates, limit, stop)
    result: dict[str, Any] = {"answers": list(question.answers)}
    if ranked:
        likeliest = sorted(range(len(ranked)), key=costs.__getitem__)[: len(question.answers)]
        result["rank"] = sum(ranked[n] in question.answers for n in likeliest) / len(question.answers)
        right = [cost for cost, candidate in zip(costs, ranked, strict=True) if candidate in question.answers]
        result["nats"] = sum(right) / len(right)
    if limit:
        result["written"] = text.decode(written)
        score_of = METRICS[question.metric] if question.metric else lambda w, q: task.match(w, q.answers)
        result["generate"] = score_of(result["written"], question)
    return result


def turn(text: Text, question: Question) -> list[int]:
    """A question and its right answer, whatever was answered: the next turn is then the same for every arm."""
    return text.encode(f"{question.prompt}{text.after}{text.gap}{', '.join(question.answers)}.\n")


def split(text: Text, prompt: str, candidates: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    """Tokens that the prompt has whatever follows, and each candidate's from there on.

    Tokens may span the border between prompt and candidate, so each candidate is tokenized behind the prompt.
    """
    ids = text.encode(prompt)
    whole = text.encode_all([prompt + text.gap + candidate for candidate in candidates])
    shared = min([len(ids), *(_common(ids, full) for full in whole)])
    if not shared or any(len(full) == shared for full in whole):
        raise ValueError(
            f"a candidate adds no token to the prompt {prompt[-40:]!r}; this tokenizer does not fit the task"
        )
    return (ids[:shared] if candidates else ids), [full[shared:] for full in whole]


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    ids: set[int] = set()
    config = getattr(unwrap(model), "generation_config", None)
    for found in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            ids |= set(found) if isinstance(found, (list, tuple)) else {int(found)}
    return ids
