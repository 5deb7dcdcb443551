"""`lcpatch bench training` at sizes for a CPU: every part runs, and wrong gradients stop it."""

import json

import pytest
import torch

from lcpatch.bench import tables, training
from lcpatch.cli import main
from lcpatch.core.errors import BenchmarkError


def test_every_part_runs(tmp_path, capsys: pytest.CaptureFixture):
    out = tmp_path / "training.json"
    assert main(["bench", "training", "--tiny", "--part", "a,b,c,d,e,f,g", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["checks"][0]["passed"]
    assert result["kappa"] == 2 * 2 * 4 * 8 * 4
    rows = [training.Row(**row) for row in result["rows"]]
    assert {row.part for row in rows} == set(training.PARTS)
    assert all(row.seconds > 0 for row in rows)
    arms = [row.arm for row in rows if row.part == "a"]
    assert arms == ["SDPA", "SF, groups of a quarter", "S2 64/16/16, all layers"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line[:1] in training.PARTS and line[1:3] == "  "] == [
        training.format_row(row) for row in rows
    ]
    header, lines = tables.training(result)
    assert len(lines) == len(rows)
    assert all(len(line) == len(header) for line in lines)


def test_wrong_gradients_stop_it(monkeypatch: pytest.MonkeyPatch):
    from lcpatch.training.buffers import DeviceStore

    take = DeviceStore.take

    def wrong(self, unit, grads, now):
        keys, values = take(self, unit, grads, now)
        return keys * 1.001, values

    monkeypatch.setattr(DeviceStore, "take", wrong)
    with pytest.raises(BenchmarkError, match="nothing is timed"):
        training.run("a", training.TINY)


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BenchmarkError, match="needs a CUDA GPU"):
        training.run("a")


def test_unknown_part(capsys: pytest.CaptureFixture):
    assert main(["bench", "training", "--part", "a,z"]) != 0
    assert "'z' is not one of a, b, c, d, e, f" in capsys.readouterr().err
