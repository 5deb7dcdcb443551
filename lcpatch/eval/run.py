"""`evaluate`: every task at every length under every arm, on identical samples, resumable."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..hf.models import evaluating
from ..patching.apply import RECORD, unwrap
from .arms import CACHE_CHUNK, Arm
from .reader import Reader
from .report import Report
from .store import Store
from .task import Task, Unit, task_names, tasks
from .text import Text, read_documents

SCORES = ("generate", "rank", "both")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = ("perplexity",),
    lengths: Sequence[int] = (4096,),
    *,
    arms: Sequence[Arm] = (Arm(),),
    text: Sequence[str | Path] | None = None,
    documents: Sequence[str] | None = None,
    source: str = "the given documents",
    seeds: int | Sequence[int] = 3,
    score: str = "both",
    chat: bool = False,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    beyond: bool = False,
    out: str | Path | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Measure `model` on `tasks`, once for every arm.

    Args:
        model: a causal language model, patched or not. It is put in eval mode for as long as this runs.
        tokenizer: the model's.
        tasks: names of tasks or suites; `lcpatch eval --list` lists them.
        lengths: in tokens, of context, question and answer together.
        arms: what is compared; the first is what the others are compared with.
        text: what to take text from: files, folders, tables and data sets, see `eval.text.read_documents`.
        documents: the text itself instead, and
        source: what to call it.
        seeds: how many samples a cell has, or their seeds.
        score: "generate", "rank" or "both"; perplexity is neither.
        chat: ask through the tokenizer's chat template.
        options: of the tasks, such as `{"digits": 7}`; each task takes those that it has.
        batch_size: candidates that go through the model together.
        beyond: allow lengths beyond the model's positions, to see it fail there.
        out: a folder; results are appended to its `results.jsonl` one by one, and a run that finds some goes on.
        name: what to call the model.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError: a task, length, text or arm that does not fit; nothing was run then.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(SCORES)}")
    chosen = make_tasks(tasks, options or {})
    check_lengths(model, lengths, beyond)
    if len({arm.label for arm in arms}) < len(arms) or not arms:
        raise ValueError("arms need labels of their own, and there must be at least one")
    _try_arms(model, arms)
    if documents is None:
        documents, source = read_documents(text)
    words = Text(tokenizer, documents, source, chat=chat)
    plan = _plan(chosen, words, lengths, seeds)
    store = Store(None if out is None else Path(out), _header(model, words, name, score, chat))
    _run(model, words, plan, arms, store, score, batch_size, progress)
    wanted = [_key(arm, task, unit) for task, unit in plan for arm in arms]
    return Report(
        store.header, {t.name: t.options() for t in chosen}, [a.label for a in arms], [store.rows[k] for k in wanted]
    )


def check(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    text: Sequence[str | Path] | None,
    seeds: int | Sequence[int],
    options: Mapping[str, Any],
) -> None:
    """Fail where `evaluate` would, as far as no model is needed to tell: for who trains one before.

    Raises:
        ValueError: a task, length or text that does not fit.
    """
    _plan(make_tasks(tasks, options), Text(tokenizer, *read_documents(text)), lengths, seeds)


def make_tasks(names: Sequence[str], options: Mapping[str, Any]) -> list[Task]:
    """The tasks with their options.

    Raises:
        ValueError: no task, an option that none of them has, or a value that one refuses.
    """
    kinds = [tasks.get(name) for name in task_names(names)]
    if not kinds:
        raise ValueError(f"no task was named; choices: {', '.join(tasks.all())}")
    known = {kind: {f.name for f in fields(kind)} for kind in kinds}
    if unknown := sorted(options.keys() - set().union(*known.values())):
        every = sorted(set().union(*known.values()))
        names = [kind.name for kind in kinds]
        raise ValueError(f"no option {unknown[0]!r} in {', '.join(names)}; they have: {', '.join(every) or 'none'}")
    return [kind(**{k: v for k, v in options.items() if k in known[kind]}) for kind in kinds]


def check_lengths(model: nn.Module, lengths: Sequence[int], beyond: bool) -> None:
    """Refuse lengths that the model was not made for.

    Raises:
        ValueError: below 2, or beyond the model's positions without `beyond`.
    """
    _at_least_two(lengths)
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    if limit and max(lengths) > limit and not beyond:
        raise ValueError(
            f"length {max(lengths)} is beyond the {limit} positions of this model: ask for shorter --lengths, scale "
            "its RoPE (config.rope_parameters) first, or add --beyond to see it fail there"
        )


def _try_arms(model: nn.Module, arms: Sequence[Arm]) -> None:
    """Set every arm up once: one that cannot be fails before the others have been measured."""
    with warnings.catch_warnings(action="ignore"):  # they come again, when the arm is measured
        for arm in arms:
            with arm.on(model) as make_cache:
                if make_cache is not None:
                    make_cache()


def _at_least_two(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths {list(lengths)} must be at least 2 tokens each, and at least one")


def _plan(
    chosen: Sequence[Task], text: Text, lengths: Sequence[int], seeds: int | Sequence[int]
) -> list[tuple[Task, Unit]]:
    """Everything to measure. One sample of each task and length is built: what cannot be fails before all else."""
    _at_least_two(lengths)
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seeds:
        raise ValueError("seeds must be at least one: it is what samples are drawn with")
    plan = []
    for task in chosen:
        for length in dict.fromkeys(lengths):
            units = list(task.units(text, length, seeds))
            try:
                task.sample(text, units[0])
            except ValueError as error:
                raise ValueError(f"{task.name} at {length} tokens: {error}") from error
            plan += [(task, unit) for unit in units]
    return plan


def _header(model: nn.Module, text: Text, name: str | None, score: str, chat: bool) -> dict[str, Any]:
    """What results must have in common to lie in one file."""
    config = unwrap(model).config
    record = getattr(unwrap(model), RECORD, None)
    return {
        "model": name or getattr(config, "name_or_path", "") or config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "patch": record.config.to_dict() if record else None,
        "text": text.name,
        "text_tokens": len(text.stream),
        "text_hash": text.fingerprint,
        "score": score,
        "chat": chat,
    }


def _key(arm: Arm, task: Task, unit: Unit) -> str:
    return f"{arm.label}|{task.name}({', '.join(f'{k}={v}' for k, v in task.cell_options().items())})|{unit.key}"


def _run(
    model: nn.Module,
    text: Text,
    plan: Sequence[tuple[Task, Unit]],
    arms: Sequence[Arm],
    store: Store,
    score: str,
    batch_size: int,
    progress: bool | None,
) -> None:
    todo = [(task, unit, [a for a in arms if _key(a, task, unit) not in store.rows]) for task, unit in plan]
    work = {a.label: sum(unit.length for _, unit, left in todo if a in left) for a in arms}
    for arm in arms:
        arm.warn()
    # In tokens, not samples, so that the ETA holds when lengths differ.
    look = {"unit": "tok", "unit_scale": True, "disable": None if progress is None else not progress}
    with evaluating(model), tqdm(total=sum(work.values()), **look) as bar:
        for task, unit, left in todo:
            sample = task.sample(text, unit) if left else None  # once, for all arms
            for arm in left:
                bar.set_description_str(f"{task.name} {unit.length} {arm.label}"[:48])
                row = _measure(model, text, task, sample, arm, score, batch_size)
                facts = {
                    "arm": arm.label,
                    "task": task.name,
                    "length": unit.length,
                    "seed": unit.seed,
                    **unit.facts,
                }
                store.add(_key(arm, task, unit), facts | row)
                bar.update(unit.length)


def _measure(
    model: nn.Module, text: Text, task: Task, sample: Any, arm: Arm, score: str, batch_size: int
) -> dict[str, Any]:
    chunk = arm.chunk or (CACHE_CHUNK if arm.cache and task.scores_text else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=UserWarning)
        with arm.on(model) as make_cache:
            return task.measure(text, sample, Reader(model, make_cache, chunk=chunk, batch_size=batch_size), score)
