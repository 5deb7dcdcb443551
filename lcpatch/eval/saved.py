"""Read a saved `report.json` back. It may come from anywhere, so everything in it is checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import METRICS, SCHEMA, Report, metrics
from .task import tasks

FILE = "report.json"
MAX_BYTES = 16 * 2**20
RUN = {"model": str, "dtype": str, "text": str, "text_hash": str, "parameters": int, "text_tokens": int, "chat": bool}
"""What the report's own Markdown and pictures read of the run."""


def read_report(source: Report | Mapping[str, Any] | str | Path) -> Report:
    """The report that `Report.save` wrote.

    Args:
        source: a `report.json`, the folder it lies in, its content, or a report, which is given back.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a report, a newer one, or one whose parts do not fit together.
    """
    if isinstance(source, Report):
        return source
    if isinstance(source, Mapping):
        return _checked(source, "the report")
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes, which no report of `lcpatch eval` is")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return _checked(data, str(path))


def _checked(data: Mapping[str, Any], source: str) -> Report:
    def need(ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{source}: {rule}; make it anew with `lcpatch eval … --out FOLDER`")

    schema = data.get("schema")
    need(type(schema) is int and schema >= 1, f"schema={schema!r} must be a whole number from 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise ValueError(f"{source} has schema {schema}; this lcpatch reads up to {SCHEMA}: pip install -U lcpatch")
    run, options, arms, rows = (data.get(name) for name in ("run", "tasks", "arms", "rows"))
    need(isinstance(run, Mapping), "run must be an object")
    for name, kind in RUN.items():
        need(type(run.get(name)) is kind, f"run.{name} must be of type {kind.__name__}")
    need(isinstance(options, Mapping) and bool(options), "tasks must be an object, and not empty")
    for name, given in options.items():
        tasks.get(name)
        need(isinstance(given, Mapping), f"tasks.{name} must be an object")
    need(isinstance(arms, list) and bool(arms) and all(isinstance(a, str) for a in arms), "arms must be labels")
    need(len(set(arms)) == len(arms), "arms must have labels of their own")
    made_with, command = data.get("versions"), data.get("command")
    texts = isinstance(made_with, Mapping) and all(isinstance(v, str) for v in made_with.values())
    need(texts and {"lcpatch", "torch", "transformers", "device"} <= set(made_with), "versions must be an object")
    need(command is None or isinstance(command, str), "command must be a string")
    need(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "rows must be a list of objects")
    for row in rows:
        _check_row(row, options, arms, need)
    report = Report(dict(run), dict(options), arms, rows, dict(made_with), command)
    _check_grid(report, need)
    return report


def _check_row(row: dict[str, Any], options: Mapping[str, Any], arms: list[str], need: Any) -> None:
    task, arm = row.get("task"), row.get("arm")
    need(isinstance(task, str) and task in options, f"a row has task={task!r}, which is none of its tasks")
    need(isinstance(arm, str) and arm in arms, f"a row has arm={arm!r}, which is none of its arms")
    need(type(row.get("length")) is int and row["length"] > 0, f"a row has length={row.get('length')!r}")
    need(type(row.get("seed")) is int, f"a row has seed={row.get('seed')!r}")
    for name in (*METRICS, "chance", "depth"):
        need(name not in row or _is_number(row[name]), f"a row has {name}={row.get(name)!r}")
    need("rank" not in row or "chance" in row, "a row is ranked, and says no chance")
    need(not any(abs(row.get(m, 0)) > 700 for m in METRICS), "a row's metric is beyond what exp can hold")
    if task == "perplexity":
        parts = row.get("positions")
        good = isinstance(parts, list) and bool(parts) and all(isinstance(p, list) and len(p) == 3 for p in parts)
        need(good and all(_is_number(x) and abs(x) < 2**40 for p in parts for x in p), "a row's positions are broken")
        need(all(b > a and mean < 700 for a, b, mean in parts), "a row's positions are broken")


def _check_grid(report: Report, need: Any) -> None:
    """Every arm must have been asked the same, or no difference could be taken."""
    cells: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in report.rows:
        cells.setdefault((row["task"], row["length"]), {}).setdefault(row["arm"], []).append(row)
    need({task for task, _ in cells} == set(report.options), "a task has no rows")
    depths: dict[str, set[frozenset[Any]]] = {}
    for (task, length), by_arm in cells.items():
        where = f"{task} at {length} tokens"
        need(set(by_arm) == set(report.arms), f"{where}: an arm has no rows")
        asked = [[(r["seed"], r.get("depth")) for r in rows] for rows in by_arm.values()]
        need(all(a == asked[0] for a in asked), f"{where}: the arms were not asked the same")
        said = {tuple(metrics(rows)) for rows in by_arm.values()}
        need(len(said) == 1 and said != {()}, f"{where}: the arms have different metrics, or none")
        depths.setdefault(task, set()).add(frozenset(depth for _, depth in asked[0]))
        if task == "perplexity":
            sizes = {len(r["positions"]) for rows in by_arm.values() for r in rows}
            need(len(sizes) == 1, f"{where}: windows have different positions")
    for task, found in depths.items():
        need(len(found) == 1, f"{task}: lengths have different depths")
        need(None not in (one := next(iter(found))) or len(one) == 1, f"{task}: some rows have no depth")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
