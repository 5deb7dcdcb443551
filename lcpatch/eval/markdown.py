"""A report as Markdown: what a model card and a reader want, protocol included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

NAMES = {
    "nll": "perplexity",
    "tail_nll": "perplexity, last 1024 tokens",
    "bits_per_byte": "bits per byte",
    "rank": "ranked",
    "generate": "generated",
}


def render(report: Report) -> str:
    """The whole report."""
    run = report.header
    lines = [f"# {run['model']}: long-context evaluation", "", *_facts(report), ""]
    for task in report.options:
        lines += [*_section(report, task), ""]
    return "\n".join(lines)


def _facts(report: Report) -> list[str]:
    run, found = report.header, report.made_with
    seeds = sorted({row["seed"] for row in report.rows})
    chat = "through the chat template" if run["chat"] else "as plain text"
    return [
        f"- Model: {run['model']}, {run['parameters'] / 1e6:.1f}M parameters, {run['dtype']}, on {found['device']}",
        f"- Text: {run['text']}, {run['text_tokens']} tokens (sha256 {run['text_hash']}); asked {chat}",
        f"- Seeds: {', '.join(map(str, seeds))}; every arm got the same samples",
        f"- Arms: {', '.join(report.arms)}; differences are paired, from {report.arms[0]}",
        "- In brackets: 95 % bootstrap intervals over samples",
        f"- lcpatch {found['lcpatch']}, torch {found['torch']}, transformers {found['transformers']}",
        *([f"- Command: `{report.command}`"] if report.command else []),
    ]


def _section(report: Report, task: str) -> list[str]:
    from .report import title_of

    options = ", ".join(f"{k}={v}" for k, v in report.options[task].items())
    lines = [f"## {task}: {title_of(task)}", "", f"`{options}`" if options else "", ""]
    cells = [cell for cell in report.cells if cell["task"] == task]
    head = ["length", "metric", *report.arms, *(f"{arm} − {report.arms[0]}" for arm in report.arms[1:])]
    lines += ["| " + " | ".join(head) + " |", "| ---: | --- |" + " ---: |" * (len(head) - 2)]
    for length, metric in dict.fromkeys((cell["length"], cell["metric"]) for cell in cells):
        row = [cell for cell in cells if (cell["length"], cell["metric"]) == (length, metric)]
        name = NAMES[metric]
        if "chance" in row[0]:
            name += f" (chance {row[0]['chance']:.0%})"
        shown = [str(length), name, *(mean_of(cell) for cell in row), *(difference_of(cell) for cell in row[1:])]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def mean_of(cell: dict[str, Any]) -> str:
    """A cell's mean and interval, in the metric's own unit."""
    values = [cell["mean"], cell["mean_low"], cell["mean_high"]]
    if "perplexity" in cell:
        return _shown([math.exp(v) for v in values], "{:.2f}")
    return _shown(values, "{:.3f}" if cell["metric"] == "bits_per_byte" else "{:.0%}")


def difference_of(cell: dict[str, Any]) -> str:
    """A cell's paired difference from the first arm."""
    values = [cell["difference"], cell["difference_low"], cell["difference_high"]]
    if "perplexity" in cell:
        return _shown(values, "{:+.4f}") + " nats"
    return _shown(values, "{:+.4f}" if cell["metric"] == "bits_per_byte" else "{:+.0%}")


def _shown(values: list[float], form: str) -> str:
    mean, low, high = values
    return form.format(mean) if math.isnan(low) else f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]"
