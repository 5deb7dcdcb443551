"""`lcpatch bench training` at sizes for a CPU: every part runs, and wrong gradients stop it."""

import json
from dataclasses import replace

import pytest
import torch

from lcpatch.bench import tables, training, training_parts
from lcpatch.bench.training_setup import TINY
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
        training.run("a", TINY)


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BenchmarkError, match="needs a CUDA GPU"):
        training.run("a")


def test_what_runs_out_of_memory_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    """Draws of part d whose kept chunks do not fit; and all of it, where there is then no bound."""
    chunks, fits = training_parts.Parts._chunks, [7]

    def tight(self, length, chunk=None, **options):
        fits[0] -= 1
        if fits[0] < 0:
            raise torch.OutOfMemoryError
        chunks(self, length, chunk, **options)

    monkeypatch.setattr(training_parts.Parts, "_chunks", tight)
    rows = training.run("da", replace(TINY, draws=3))["rows"]
    assert [row["why"] for row in rows if row["part"] == "d"] == [None, None, None, None, "out of memory", None]
    assert rows[5]["arm"] == "2 draws"
    assert rows[-1]["part"] == "a"
    fits[0] = 0
    assert [row["why"] for row in training.run("d", TINY)["rows"]] == [None, "out of memory"]
