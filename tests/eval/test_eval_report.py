"""Statistics against known answers, and the report: JSON, Markdown, model-index, pictures."""

import json
import math

import numpy as np
import pytest
import yaml
from eval_cases import DOCUMENTS, model, tokenizer

from lcpatch.eval import Arm, evaluate, recovery
from lcpatch.eval.report import Report
from lcpatch.eval.stats import bootstrap, paired

ARMS = [Arm(), Arm("sink", {"window": 9, "num_sinks": 1})]
TASKS = ["perplexity", "passkey", "niah_multiquery"]


@pytest.fixture(scope="module")
def report():
    options = {"max_windows": 3, "depths": 2}
    return evaluate(
        model(), tokenizer(), TASKS, [400, 500], arms=ARMS, documents=DOCUMENTS, seeds=2, options=options, name="tiny"
    )


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        mean, low, high = bootstrap(rng.normal(3, 1, 50).tolist(), resamples=300, seed=trial)
        assert low < mean < high
        hits += low <= 3 <= high
    assert 0.85 <= hits / 200 <= 1


def test_paired_differences_are_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 40)
    better = base - 0.5 + rng.normal(0, 0.1, 40)
    mean, low, high = paired(better.tolist(), base.tolist())
    assert low < -0.5 < high < 0
    assert mean == pytest.approx(float((better - base).mean()))
    with pytest.raises(ValueError, match="not of the same samples"):
        paired([1.0], [1.0, 2.0])


def test_one_sample_has_no_interval():
    mean, low, high = bootstrap([2.0])
    assert mean == 2
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(ValueError, match="nothing was measured"):
        bootstrap([])


def test_recovery_by_hand():
    full, base = [[2.0, 2.2]] * 3, [[3.0, 3.2]]
    half = [[2.5, 2.7]] * 3
    found = recovery(half, full, {"pi": base, "short": [[2.5, 2.7]] * 3})
    assert found["pi"]["nats"][0] == pytest.approx(0.5)
    p0, px, pfull = (math.exp(x) for x in (3.1, 2.6, 2.1))
    assert found["pi"]["ppl"][0] == pytest.approx((p0 - px) / (p0 - pfull))
    assert found["short"]["nats"][0] == pytest.approx(0)  # the arm is its own baseline
    assert recovery(full, full, {"pi": base})["pi"]["nats"] == pytest.approx((1, 1, 1))


def test_recovery_from_seeds_that_differ_has_an_interval():
    rng = np.random.default_rng(1)
    windows = rng.normal(3, 0.5, 30)
    full, arm, base = (
        [(windows + shift + rng.normal(0, 0.02)).tolist() for _ in range(4)] for shift in (0.0, 0.2, 1.0)
    )
    value, low, high = recovery(arm, full, {"short": base})["short"]["nats"]
    assert low < value < high
    assert low < 0.8 < high


@pytest.mark.parametrize(
    ("arm", "full", "message"),
    [
        ([[1.0]] * 2, [[1.0]] * 3, "at least 3 seeds; 'arm' has 2"),
        ([[1.0]] * 3, [[1.0, 2.0]] * 3, "same seeds and windows"),
        ([[1.0], [1.0], [1.0, 2.0]], [[1.0]] * 3, "different numbers of windows"),
    ],
)
def test_recovery_refuses(arm, full, message):
    with pytest.raises(ValueError, match=message):
        recovery(arm, full, {"pi": [[2.0]]})


def test_cells_follow_from_the_rows(report):
    assert {cell["arm"] for cell in report.cells} == {arm.label for arm in ARMS}
    for cell in report.cells:
        values = [r[cell["metric"]] for r in report.rows_of(cell["task"], cell["arm"], cell["length"])]
        assert cell["mean"] == pytest.approx(sum(values) / len(values))
        assert cell["samples"] == len(values)
        assert ("difference" in cell) == (cell["arm"] != ARMS[0].label)
        if cell["metric"] == "rank":
            assert 0 < cell["chance"] < 1


def test_arms_saw_the_same_samples(report):
    first, second = ([r for r in report.rows if r["arm"] == arm.label] for arm in ARMS)
    same = ("task", "length", "seed", "tokens")
    assert [[row[k] for k in same] for row in first] == [[row[k] for k in same] for row in second]
    asked = [[q["answers"] for row in rows for q in row.get("questions", ())] for rows in (first, second)]
    assert asked[0] == asked[1]


def test_saved_report_reads_back(report, tmp_path):
    paths = report.save(tmp_path)
    assert sorted(path.name for path in paths) == sorted(file.name for file in tmp_path.iterdir())
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema"] == 1
    assert data["run"]["model"] == "tiny"
    assert data["arms"] == [arm.label for arm in ARMS]
    assert len(data["cells"]) == len(report.cells)
    again = Report(data["run"], data["tasks"], data["arms"], data["rows"])
    assert again.cells == report.cells
    for name in ("perplexity.png", "passkey.png", "tasks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (entry,) = yaml.safe_load((tmp_path / "model-index.yaml").read_text())["model-index"]
    from huggingface_hub import ModelCardData

    card = ModelCardData(model_name="tiny", **{"model-index": [entry]})
    assert yaml.safe_load(card.to_yaml())["model-index"][0]["results"]


def test_markdown_has_every_number(report):
    text = report.markdown()
    for task in TASKS:
        assert f"## {task}: " in text
    cell = next(c for c in report.cells if c["metric"] == "nll")
    assert f"{cell['perplexity']:.2f} [" in text
    assert "chance 25%" in text
    assert "protocol=longlora" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {2 + 2 + len(ARMS)}
    assert "nan" not in text


def test_one_sample_and_one_arm_are_a_report_too(tmp_path):
    small = evaluate(
        model(), tokenizer(), ["perplexity", "needle"], [400], documents=DOCUMENTS, seeds=1,
        options={"max_windows": 1, "depths": 1},
    )  # fmt: skip
    small.save(tmp_path)
    assert "nan" not in (tmp_path / "report.md").read_text().lower()
    assert json.loads((tmp_path / "report.json").read_text())["cells"][0]["mean_low"] is None
