"""`lcpatch bench cache` on a tiny model on the CPU: every arm runs, what is wrong is refused."""

import json

import pytest
import torch

from lcpatch.bench import cache, tables
from lcpatch.bench.geometry import TINY
from lcpatch.caches.h2o import H2OLayer
from lcpatch.cli import main
from lcpatch.core.errors import BenchmarkError


def test_every_arm_runs_and_makes_a_table(tmp_path, capsys):
    out = tmp_path / "cache-tiny.json"
    arms = "; ".join(arm.name for arm in cache.ARMS)
    assert main(["bench", "cache", "--tiny", "--tasks", "1:200,2:150", "--arms", arms, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["checks"][0]["passed"]
    assert [(r["batch"], r["arm"]) for r in result["rows"]] == [(b, a.name) for b in (1, 2) for a in cache.ARMS]
    held = {(r["batch"], r["arm"]): r["cache_gib"] for r in result["rows"]}
    assert held[1, "H2O 0.2"] < held[1, "DynamicCache"] / 2
    assert held[1, "H2O 0.2, int8"] < held[1, "H2O 0.2"] / 2
    header, lines = tables.cache(result)
    assert all(len(line) == len(header) for line in lines)
    assert "decode" in capsys.readouterr().out
    assert main(["bench", "tables", str(out)]) == 0


def test_a_result_grows_by_what_is_appended(tmp_path, capsys):
    out = tmp_path / "cache-tiny.json"

    def bench(*words: str, arms: str, task: str = "1:100") -> int:
        return main(["bench", "cache", "--tiny", "--tasks", task, "--arms", arms, "--out", str(out), *words])

    assert bench("--commit", "a", arms="H2O 0.2; DynamicCache") == 0
    first = json.loads(out.read_text())["rows"]
    assert bench("--commit", "a", "--append", arms="DynamicCache; Cluster 0.2") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["H2O 0.2", "DynamicCache", "Cluster 0.2"]
    assert rows[0] == first[0]
    assert rows[1] != first[1]
    assert bench("--commit", "b", "--append", arms="H2O 0.2") == 2
    assert "the file has commit 'a', this run 'b'" in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"] == rows


def test_a_wrong_cache_is_not_timed(monkeypatch):
    real = H2OLayer.attention

    def wrong(self, call, keys, values):
        out, lse = real(self, call, keys, values)
        return out * 1.1, lse

    monkeypatch.setattr(H2OLayer, "attention", wrong)
    with pytest.raises(BenchmarkError, match="nothing is timed"):
        cache.run(((1, 100),), TINY, "cpu", chunk=32)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--tasks", "32768"], "is not BATCH:TOKENS"), (["--arms", "H3O"], "'H3O' is not one of"), ([], "needs a CUDA")],
)
def test_refusals(words, message, capsys):
    if not words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tiny = ["--tiny"] if words else []
    assert main(["bench", "cache", *tiny, *words]) == 2
    assert message in capsys.readouterr().err
