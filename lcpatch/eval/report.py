"""What was measured, as JSON, as Markdown, as pictures, and as the Hub's model-index."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .stats import Interval, bootstrap, paired
from .task import tasks

SCHEMA = 1
METRICS = ("nll", "tail_nll", "bits_per_byte", "rank", "generate")
"""What a row may say, the main figure first."""
ACCURACIES = ("rank", "generate")


@dataclass(frozen=True)
class Report:
    """Args:
    header: the model, the text, and how it was asked.
    options: of each task.
    arms: labels; the first is the one that the others are compared with.
    rows: every sample under every arm.
    made_with: versions and device of the run; default: this process's.
    command: the command line that made it, if one did.
    """

    header: dict[str, Any]
    options: dict[str, dict[str, Any]]
    arms: list[str]
    rows: list[dict[str, Any]]
    made_with: dict[str, str] = field(default_factory=lambda: versions())
    command: str | None = None

    def rows_of(self, task: str, arm: str, length: int | None = None) -> list[dict[str, Any]]:
        """The samples of one cell, in the same order for every arm."""
        return [r for r in self.rows if (r["task"], r["arm"]) == (task, arm) and length in (None, r["length"])]

    def lengths(self, task: str) -> list[int]:
        return sorted({r["length"] for r in self.rows if r["task"] == task})

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """Task x length x metric x arm: mean and interval, chance, and the paired difference from the first arm."""
        found = []
        for task in self.options:
            for length in self.lengths(task):
                for metric in metrics(self.rows_of(task, self.arms[0], length)):
                    found += [self._cell(task, length, metric, arm) for arm in self.arms]
        return found

    def _cell(self, task: str, length: int, metric: str, arm: str) -> dict[str, Any]:
        rows, base = self.rows_of(task, arm, length), self.rows_of(task, self.arms[0], length)
        values = [row[metric] for row in rows]
        cell = {"task": task, "length": length, "metric": metric, "arm": arm, "samples": len(rows)}
        cell |= _interval("mean", bootstrap(values))
        if metric == "rank":
            cell["chance"] = sum(row["chance"] for row in rows) / len(rows)
        if metric.endswith("nll"):
            cell["perplexity"] = math.exp(cell["mean"])
        if arm != self.arms[0]:
            cell |= _interval("difference", paired(values, [row[metric] for row in base]))
        return cell

    def value(self, task: str, length: int, metric: str, arm: str | None = None) -> float:
        """The mean of one cell."""
        (cell,) = (
            c for c in self.cells
            if (c["task"], c["length"], c["metric"], c["arm"]) == (task, length, metric, arm or self.arms[0])
        )  # fmt: skip
        return cell["mean"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN, which JSON has not, becomes null."""
        return {
            "schema": SCHEMA,
            "run": {k: v for k, v in self.header.items() if k != "schema"},
            "versions": self.made_with,
            **({"command": self.command} if self.command else {}),
            "tasks": self.options,
            "arms": self.arms,
            "seeds": sorted({row["seed"] for row in self.rows}),
            "cells": [{k: None if v != v else v for k, v in cell.items()} for cell in self.cells],
            "rows": self.rows,
        }

    def markdown(self) -> str:
        from .markdown import render

        return render(self)

    def model_index(self) -> list[dict[str, Any]]:
        """Entries for the `model-index` of a model card: one a cell of every arm."""
        results = []
        for cell in self.cells:
            value, kind = cell["mean"], "accuracy" if cell["metric"] in ACCURACIES else cell["metric"]
            if "perplexity" in cell:
                value, kind = cell["perplexity"], "perplexity"
            label = f"{cell['task']}, {cell['length']} tokens, {cell['arm']}, {cell['metric']}"
            results.append(
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": f"{cell['task']} ({self.header['text']})", "type": cell["task"]},
                    "metrics": [{"type": kind, "name": label, "value": round(value, 6)}],
                }
            )
        return [{"name": self.header["model"], "results": results}]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `report.json`, `report.md`, `model-index.yaml` and the pictures; gives their paths."""
        import yaml

        from .plots import draw_all

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "report.json": json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            "report.md": self.markdown(),
            "model-index.yaml": yaml.safe_dump(
                {"model-index": self.model_index()}, sort_keys=False, allow_unicode=True
            ),
        }
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        pictures = draw_all(self)
        for name, figure in pictures.items():
            figure.savefig(folder / name, dpi=150)
        return [folder / name for name in (*files, *pictures)]


def metrics(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What these rows say, the main figure first."""
    return [m for m in METRICS if all(m in row for row in rows)]


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import torch
    import transformers

    from .. import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "lcpatch": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }


def title_of(task: str) -> str:
    return tasks.get(task).title


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
