"""`lcpatch bench cache` on a tiny model on the CPU: every arm runs, what is wrong is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcpatch.bench import cache, clock, environment, peers, tables
from lcpatch.bench.cache_arms import ARMS, Arm, _dynamic, _of
from lcpatch.bench.geometry import TINY
from lcpatch.caches.h2o import H2OCache, H2OLayer
from lcpatch.caches.held import bytes_held
from lcpatch.caches.tiered import TieredCache
from lcpatch.cli import main
from lcpatch.core.errors import BenchmarkError
from lcpatch.hf.decode_ahead import decode_ahead


def test_every_arm_runs_and_makes_a_table(tmp_path, capsys):
    out = tmp_path / "cache-tiny.json"
    arms = "; ".join(arm.name for arm in ARMS)
    assert main(["bench", "cache", "--tiny", "--tasks", "1:200,2:150", "--arms", arms, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["checks"][0]["passed"]
    assert [(r["batch"], r["arm"]) for r in result["rows"]] == [(b, a.name) for b in (1, 2) for a in ARMS]
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
    assert [row["arm"] for row in first] == ["DynamicCache", "H2O 0.2"]  # as in ARMS, whatever the command said
    assert [row["arm"] for row in rows] == ["DynamicCache", "H2O 0.2", "Cluster 0.2"]
    assert rows[0] != first[0]
    assert rows[1] == first[1]
    assert bench("--commit", "b", "--append", arms="H2O 0.2") == 0
    grown = json.loads(out.read_text())
    assert [(row["arm"], row.get("commit", grown["commit"])) for row in grown["rows"]] == [
        ("DynamicCache", "a"),
        ("H2O 0.2", "b"),
        ("Cluster 0.2", "a"),
    ]
    assert tables.provenance(grown).endswith("commits a, b")
    out.write_text(json.dumps({**grown, "torch": "1.0"}))
    assert bench("--commit", "b", "--append", arms="H2O 0.2") == 2
    assert "has torch '1.0', this run" in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"] == grown["rows"]


def _rows(*names: str) -> list[dict]:
    return cache.run(((1, 200), (2, 200)), TINY, "cpu", arms=names, chunk=64)["rows"]


def test_a_peer_that_is_not_installed_says_how_it_is(monkeypatch, capsys):
    monkeypatch.setattr(environment, "installed", lambda name: None)
    names = [arm.name for arm in ARMS if arm.needs]
    assert len(names) == 4
    rows = _rows(*names)
    assert [row["arm"] for row in rows] == 2 * names
    assert {row["why"] for row in rows} == {f"needs `{line}`" for line in peers.INSTALL.values()}
    assert all(row["why"] in capsys.readouterr().out for row in rows[:1])
    header, lines = tables.cache({"rows": rows})
    assert all(len(line) == len(header) for line in lines)


def test_a_peer_that_fails_says_why_and_an_arm_of_ours_raises(monkeypatch):
    def make(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(environment, "installed", lambda name: "0.0")
    monkeypatch.setattr(cache, "ARMS", (Arm("peer", make, needs="hqq"), Arm("ours", make)))
    assert "hqq 0.0 fails under transformers" in _rows("peer")[0]["why"]
    assert _rows("peer")[1]["why"].endswith(": RuntimeError: two lines")
    with pytest.raises(RuntimeError, match="two"):
        _rows("ours")


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.needs], ids=lambda arm: arm.name)
def test_a_peer_that_is_installed_runs(arm):
    if why := peers.missing(arm.needs):
        pytest.skip(why)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    rows = _rows("DynamicCache", arm.name)
    assert {name: ALL_ATTENTION_FUNCTIONS[name] for name in before} == before
    for full, row in zip(rows[::2], rows[1::2], strict=True):
        assert row["why"] is None
        share = row["cache_gib"] / full["cache_gib"]
        if arm.needs == "kvpress":
            assert 39 <= round(200 * share) <= 40  # 200 * (1 - 0.8) is a little less than 40
        else:  # 4 bits of 32, and a scale and a zero (fp32 here) for 64 numbers
            assert 4 / 32 < share <= 4 / 32 + 2 / 64


def test_a_slow_arm_is_given_up_and_the_others_go_on(monkeypatch, capsys):
    """By a clock that goes on ten seconds with each of the two layers' steps."""
    now, real = [0], DynamicCache.update

    def slow(self, *args, **kwargs):
        now[0] += 10
        return real(self, *args, **kwargs)

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(cache, "ARMS", (Arm("slow", _dynamic, 64), Arm("H2O 0.2", _of(H2OCache, 0.2))))
    monkeypatch.setattr(cache, "check", lambda *_: {"passed": True})
    monkeypatch.setattr(DynamicCache, "update", slow)
    rows = cache.run(((1, 200),), TINY, "cpu", chunk=64, limit_s=45)["rows"]
    assert rows[0]["why"] == "given up after 60 s, 64 of 200 tokens read"
    assert rows[0]["decode_ms"] is None
    assert (rows[1]["arm"], rows[1]["why"]) == ("H2O 0.2", None)
    assert "slow: 40 s, 128 of 128 tokens read" in capsys.readouterr().out


def test_a_tiered_cache_says_what_it_fetches(monkeypatch, capsys):
    page = 2 * 2 * 2 * 32 * 16 * 4  # keys and values of 32 tokens, for both layers and both heads
    arms = (Arm("Tiered", _of(TieredCache, gpu_bytes=6 * page), 64), Arm("DynamicCache", _dynamic))
    monkeypatch.setattr(cache, "ARMS", arms)
    tiered, full = _rows("Tiered", "DynamicCache")[:2]
    assert 0 <= tiered["hit_rate"] < 1
    assert tiered["fetched_mib"] > 0
    assert full["hit_rate"] is full["fetched_mib"] is None
    assert "MiB/token, hit rate" in capsys.readouterr().out


def test_bytes_of_tuples_and_of_tensors_made_of_others():
    codes, scale, zero, a, b = (torch.zeros(size) for size in (16, 2, 4, 8, 8))
    layer = SimpleNamespace(
        keys=(codes, {"scale": scale, "zero": zero, "axis": 1}), values=TwoTensor(a, b), again=codes
    )
    assert bytes_held([layer]) == {"device": 4 * (16 + 2 + 4 + 8 + 8)}


def test_peers_run_in_the_loop_of_transformers_and_a_row_says_whose_it_is():
    arms = {arm.name: arm for arm in ARMS}
    own = [arm for arm in ARMS if arm.loop is not None]
    assert own
    assert own == [arm for arm in ARMS if arm.name.endswith("decode_ahead")]
    assert all(arm.make is arms[arm.name.removesuffix(", decode_ahead")].make for arm in own)


def test_an_arm_generates_in_its_loop(monkeypatch):
    lengths = []

    def loop(model, input_ids, *args, stopping_criteria, **kwargs):
        lengths.append(stopping_criteria.max_length - input_ids.shape[1])
        return decode_ahead(model, input_ids, *args, stopping_criteria=stopping_criteria, **kwargs)

    monkeypatch.setattr(cache, "ARMS", (Arm("ours", _of(H2OCache, 0.2, compiled=True), 64, loop=loop),))
    row = cache.run(((1, 200),), TINY, "cpu", chunk=64)["rows"][0]
    assert row["why"] is None
    assert lengths == [9, 1, 9, 1, 9]


def test_a_wrong_cache_is_not_timed(monkeypatch):
    real = H2OLayer.attention

    def wrong(self, call, keys, values):
        out, lse = real(self, call, keys, values)
        return out * 1.1, lse

    monkeypatch.setattr(H2OLayer, "attention", wrong)
    with pytest.raises(BenchmarkError, match="nothing is timed"):
        cache.run(((1, 100),), TINY, "cpu", chunk=32)


def test_without_a_gpu_nothing_is_measured(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "cache"]) == 2
    assert "needs a CUDA" in capsys.readouterr().err


def test_lines_have_their_columns_in_one_place():
    rows = [cache.Row(arm.name, 1, 96, why="out of memory") for arm in cache.ARMS]
    assert len({cache.format_row(row).index("out of memory") for row in rows}) == 1
