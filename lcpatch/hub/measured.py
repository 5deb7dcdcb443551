"""What a card says of an `lcpatch eval` report: the run's facts, tables, pictures and the Hub's model-index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..eval.markdown import NAMES, difference_of, mean_of
from ..eval.report import title_of
from .escape import Ready, clean, code

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..eval.report import Report

BASELINE = "dense"
"""The label of the arm that is the model as it is."""


@dataclass(frozen=True)
class Table:
    """One task: its name and title, and the table as Markdown."""

    name: str
    title: str
    options: str
    text: Ready


@dataclass(frozen=True)
class Measured:
    """Args:
    facts: (name, value) pairs that say how it was measured.
    has_baseline: whether the unpatched model was measured too.
    tables: one a task.
    command: what to run to get the same.
    """

    facts: list[tuple[str, str]]
    has_baseline: bool
    tables: list[Table]
    command: str | None

    @classmethod
    def of(cls, report: Report) -> Measured:
        run, made_with = report.header, report.made_with
        seeds = sorted({row["seed"] for row in report.rows})
        model = Path(run["model"])
        name = model.name if model.is_absolute() else run["model"]  # where it lay is no one's business
        facts = [
            ("Model", f"{name}, {run['parameters'] / 1e6:.1f}M parameters, {run['dtype']}"),
            ("Hardware", made_with["device"]),
            ("Versions", ", ".join(f"{name} {made_with[name]}" for name in ("lcpatch", "torch", "transformers"))),
            ("Text", f"{run['text']}, {run['text_tokens']} tokens (sha256 {run['text_hash']})"),
            ("Asked", "through the chat template" if run["chat"] else "as plain text"),
            ("Seeds", ", ".join(map(str, seeds))),
        ]
        tables = [_table(report, task) for task in report.options]
        return cls(facts, BASELINE in report.arms, tables, report.command)


def model_index(report: Report, name: str) -> list[dict[str, Any]]:
    """The metadata's `model-index`: what this model does, without the arm that is the unpatched one."""
    arms = [arm for arm in report.arms if arm != BASELINE]
    own = replace(report, arms=arms or report.arms)
    (entry,) = own.model_index()
    return [{**_cleaned(entry), "name": name}]


def pictures(report: Report) -> dict[str, Figure]:
    """The heat maps of the needles, and perplexity by length and position, by file name."""
    from ..eval.plots import heat_maps, perplexity

    drawn = {"perplexity.png": perplexity(report)} if "perplexity" in report.options else {}
    for task in report.options:
        if any("depth" in row for row in report.rows if row["task"] == task):
            drawn[f"{task}.png"] = heat_maps(report, task)
    return drawn


def _table(report: Report, task: str) -> Table:
    cells = [cell for cell in report.cells if cell["task"] == task]
    base, *others = report.arms
    differences = ["Difference"] if len(others) == 1 else [f"{code(arm)} − {code(base)}" for arm in others]
    head = ["Context", "Metric", *map(code, report.arms), *differences]
    lines = ["| " + " | ".join(head) + " |", "| ---: | --- |" + " ---: |" * (len(head) - 2)]
    for length, metric in dict.fromkeys((cell["length"], cell["metric"]) for cell in cells):
        row = [cell for cell in cells if (cell["length"], cell["metric"]) == (length, metric)]
        name = NAMES[metric] + (f" (chance {row[0]['chance']:.0%})" if "chance" in row[0] else "")
        shown = [str(length), name, *map(mean_of, row), *map(difference_of, row[1:])]
        lines.append("| " + " | ".join(shown) + " |")
    options = ", ".join(f"{k}={v}" for k, v in report.options[task].items())
    return Table(task, title_of(task), options, Ready("\n".join(lines)))


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(k): _cleaned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    return clean(value) if isinstance(value, str) else value
