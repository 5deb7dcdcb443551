"""The file of a benchmark's result: nothing that was measured is lost, and rows of several runs are told apart."""

import json
import subprocess
from pathlib import Path

import pytest

from lcpatch.bench import cache, model, record, tables, training
from lcpatch.bench.environment import commit_of
from lcpatch.bench.record import Record, with_earlier

RESULTS = Path(__file__).parents[2] / "kernels" / "results"
GEOMETRY = {"layers": 3, "size": 8}
PLACES = {"cache": cache.place, "model": model.place, "training": training.place}


def row(arm: str, *, batch: int = 1, length: int = 100, **more) -> dict:
    return {"arm": arm, "batch": batch, "length": length, "why": None, **more}


def result(*rows: dict, commit: str | None = "new", **more) -> dict:
    return {"format": 1, "gpu": "chip", "commit": commit, "rows": list(rows), **more}


def arms(found: dict) -> list[tuple]:
    return [(r["batch"], r["length"], r["arm"], r.get("commit", found["commit"])) for r in found["rows"]]


def test_rows_are_written_in_one_order_whatever_came_first(tmp_path: Path):
    file = tmp_path / "a" / "cache.json"
    names = [arm.name for arm in cache.ARMS]
    rows = [row(names[3], batch=8), row("an arm that is no more"), row(names[5]), row(names[2], length=50)]
    Record(file, cache.place).keep(result(*rows, commit="old"))
    assert arms(record.read(file)) == [
        (1, 50, names[2], "old"),
        (1, 100, names[5], "old"),
        (1, 100, "an arm that is no more", "old"),
        (8, 100, names[3], "old"),
    ]
    again = Record(file, cache.place, append=True)
    again.keep(result(row(names[4])))
    again.keep(result(row(names[4]), row(names[5], decode_ms=3.0), row(names[0], batch=8)))
    assert arms(record.read(file)) == [
        (1, 50, names[2], "old"),
        (1, 100, names[4], "new"),
        (1, 100, names[5], "new"),
        (1, 100, "an arm that is no more", "old"),
        (8, 100, names[0], "new"),
        (8, 100, names[3], "old"),
    ]
    assert record.read(file)["rows"][2]["decode_ms"] == 3.0
    assert sorted(path.name for path in file.parent.iterdir()) == ["cache.json"]


def test_what_the_readme_shows_is_in_that_order():
    """So that a run that appends to it moves nothing."""
    files = [*RESULTS.glob("*-nvidia-h200.json"), *RESULTS.glob("model-*.json")]
    shown = {path: json.loads(path.read_text()) for path in files if path.name.split("-")[0] in PLACES}
    assert len(shown) == 3
    for path, found in shown.items():
        assert sorted(found["rows"], key=PLACES[path.name.split("-")[0]]) == found["rows"], path.name


def test_draws_alike_are_rows_of_their_own():
    def draws(*seconds: float, commit: str) -> dict:
        return result(*({"part": "d", "arm": "0 of 4", "length": 9, "seconds": s} for s in seconds), commit=commit)

    first = draws(1.0, 2.0, 3.0, commit="old")
    cut = with_earlier(draws(4.0, commit="new"), first)  # a run that was interrupted
    assert [(r["seconds"], r.get("commit")) for r in cut["rows"]] == [(4.0, None), (2.0, "old"), (3.0, "old")]


def test_what_is_not_measured_again_stays():
    """Scores of other lengths, and the rows and the version of a package that this machine lacks."""
    gone = "needs `pip install press`"
    old = result(row("press", decode_ms=5.0), row("other", why=gone), commit="old")
    old |= {"scores": [{"length": 50, "ms": 1.0}, {"length": 100, "ms": 2.0}], "peers": {"press": "1.0", "other": None}}
    new = result(row("press", why=gone), row("other", why=gone), row("ours"))
    new |= {"scores": [{"length": 100, "ms": 3.0}], "peers": {"press": None, "other": None}}
    found = with_earlier(new, old)
    assert found["rows"] == [
        {"commit": "old", **row("press", decode_ms=5.0)},
        row("other", why=gone),
        row("ours"),
    ]
    assert found["scores"] == [{"commit": "old", "length": 50, "ms": 1.0}, {"length": 100, "ms": 3.0}]
    assert found["peers"] == {"press": "1.0", "other": None}
    memory = result(row("press", why="out of memory"))
    assert with_earlier({**new, **memory}, old)["rows"][0]["why"] == "out of memory"  # is what came out


def test_a_result_from_outside_of_a_checkout_makes_a_table():
    found = result(row("ours"), row("press", commit="old"), commit=None, torch="2", triton="3")
    assert tables.provenance(found).endswith("commits old, unknown")


def test_results_are_no_changes_to_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or of the benchmarks that one command runs only the first would name its commit."""

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    package, results = tmp_path / "lcpatch", tmp_path / "kernels" / "results"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) is None
    for folder in (package, results):
        folder.mkdir(parents=True)
        (folder / "a.json").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = commit_of(package)
    assert commit.isalnum()
    (results / "a.json").write_text("2")
    (results / "new.json").write_text("2")
    assert commit_of(package) == commit
    (package / "a.json").write_text("2")
    assert commit_of(package) == f"{commit}+changes"


def test_results_are_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "results" / "x.json"
    kept = Record(path)
    assert not kept.is_written
    kept.keep({"a": 1})
    with pytest.raises(TypeError):
        kept.keep({"a": object()})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert kept.is_written


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        Record(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Record(tmp_path / "file" / "x.json")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("{", "is not a result of `lcpatch bench`"),
        ("[]", "it has no list of rows"),
        ('{"rows": 3}', "it has no list of rows"),
        (result(gpu="another"), "has gpu 'another', this run 'chip': rows of both would not compare"),
        (result(geometry={"layers": 2, "size": 8}), "has geometry.layers 2, this run 3: rows of both would"),
        (result({"part": "a", "arm": "FA2", "length": 9}), "has a row without 'batch': it is of another benchmark"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_at_once(held, message: str, tmp_path: Path):
    file = tmp_path / "cache.json"
    text = held if isinstance(held, str) else json.dumps({"geometry": GEOMETRY, **held})
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Record(file, cache.place, True, {"format": 1, "gpu": "chip", "geometry": GEOMETRY})
    assert file.read_text() == text


def test_to_append_takes_a_file():
    with pytest.raises(ValueError, match="--append keeps what a file holds: give that file as --out"):
        Record(None, cache.place, append=True)
