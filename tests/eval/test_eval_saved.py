"""Saved reports read back: the same numbers, and every file that is not a report refused with a `ValueError`."""

import copy
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch.eval.plots import draw_all
from lcpatch.eval.saved import MAX_BYTES, read_report


def made() -> dict[str, Any]:
    rows = []
    for arm, extra in (("dense", 0.0), ("s2", 0.25)):
        for length in (256, 512):
            for seed in (0, 1):
                loss, facts = 2.0 + extra + 0.1 * seed, {"arm": arm, "length": length, "seed": seed}
                parts = [[0, 128, 3.0], [128, 256, 2.5 + extra]]
                rows.append({"task": "perplexity", **facts, "nll": loss, "bits_per_byte": 1.0, "positions": parts})
                answer = {"depth": 0.5, "rank": 1.0 - extra, "chance": 0.1, "generate": 0.0}
                rows.append({"task": "needle", **facts, **answer})
    run = {"model": "tiny", "parameters": 12, "dtype": "float32", "text": "a", "text_tokens": 9, "text_hash": "b"}
    made_with = {"lcpatch": "0.1.0", "torch": "2", "transformers": "5", "device": "CPU"}
    return {
        "schema": 1, "run": {**run, "chat": False}, "versions": made_with, "command": "lcpatch eval tiny",
        "tasks": {"perplexity": {}, "needle": {"depths": 1}}, "arms": ["dense", "s2"], "rows": rows,
    }  # fmt: skip


def used(data: Any) -> None:
    """Everything that a card asks of a report."""
    report = read_report(data)
    report.markdown()
    report.model_index()
    json.dumps(report.to_dict())


def test_it_reads_back(tmp_path: Path):
    report = read_report(made())
    report.save(tmp_path)
    for source in (tmp_path, tmp_path / "report.json", report):
        again = read_report(source)
        assert again.cells == report.cells
        assert again.command == "lcpatch eval tiny"
        assert again.made_with["device"] == "CPU"
    assert set(draw_all(report)) == {"perplexity.png", "needle.png", "tasks.png"}


PLACES: list[tuple[Any, ...]] = [(key,) for key in made()]
PLACES += [(outer, key) for outer in ("run", "versions", "tasks") for key in made()[outer]]
PLACES += [
    ("arms", 1),
    *(("rows", n) for n in (0, 1, -1)),
    *(("rows", n, k) for n in (0, 1) for k in made()["rows"][n]),
]
PLACES += [("rows", 0, "positions", 0), ("rows", 0, "positions", 0, 2)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=2))


@given(st.sampled_from(PLACES), VALUES, st.booleans())
@settings(max_examples=200)
def test_one_value_replaced_or_removed(place: tuple[Any, ...], value: Any, remove: bool):
    data = copy.deepcopy(made())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with suppress(ValueError):
        used(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this lcpatch reads up to 1: pip install -U lcpatch"),
        ({"schema": True}, "schema=True must be"),
        ({"rows": []}, "a task has no rows"),
        ({"arms": ["dense", "dense"]}, "labels of their own"),
        ({"tasks": {"unheard": {}}}, "unknown task 'unheard'"),
        ({"versions": {}}, "versions must be"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_report({**made(), **change})


def test_arms_that_were_asked_differently_are_refused():
    data = made()
    data["rows"][0]["seed"] = 7
    with pytest.raises(ValueError, match="the arms were not asked the same"):
        read_report(data)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b" " * (MAX_BYTES + 1)])
def test_broken_files_are_refused(content: bytes, tmp_path: Path):
    (tmp_path / "report.json").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"report\.json"):
            read_report(tmp_path)
        assert tracemalloc.get_traced_memory()[1] <= max(64 * 2**20, 4 * len(content))
    finally:
        tracemalloc.stop()
