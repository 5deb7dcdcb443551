"""A study of a tiny model: equal budgets, resumable by arm, and tables that follow from the rows alone."""

import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import training_cases

from lcpatch.eval import study, study_report
from lcpatch.eval.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reproduce():
    """recipes/reproduce.py as a module."""
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "recipes" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command line's words for two steps of a tiny model."""
    base = training_cases.base(tmp_path_factory.mktemp("base"))
    text = tmp_path_factory.mktemp("text") / "eval.txt"
    text.write_text("A sentence about nothing at all, said again and again. " * 60)
    fast = ["--length", "128", "--steps", "2", "--seeds", "1", "--windows", "2", "--passkeys", "0"]
    return ["--model", str(base), "--eval-text", str(text), *fast, "--learning-rate", "5e-3"]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_study_goes_on_where_it_stopped(reproduce, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path / "cache"))
    out = ["--out", str(tmp_path), "--arms", "untuned,full,sf,shift-rolled"]
    with monkeypatch.context() as patch:  # the second arm dies
        one, done = study._one, []

        def die(*args):
            done.append(args[1])
            if len(done) == 3:
                raise KeyboardInterrupt
            return one(*args)

        patch.setattr(study, "_one", die)
        with pytest.raises(KeyboardInterrupt):
            reproduce.main([*words, *out])
    assert [row["key"] for row in lines(tmp_path)[1:]] == ["untuned/0", "full/0"]
    assert reproduce.main([*words, *out, "--minutes", "0"]) == 0
    assert "2 of 4 runs are left; the same command goes on with sf, seed 0" in capsys.readouterr().out
    assert reproduce.main([*words, *out]) == 0
    rows = {row["arm"]: row for row in lines(tmp_path)[1:]}
    assert list(rows) == ["untuned", "full", "sf", "shift-rolled"]
    assert {row["tokens"] for name, row in rows.items() if name != "untuned"} == {256}
    assert rows["full"]["train_losses"] != rows["sf"]["train_losses"]
    assert rows["sf"]["perplexity"].keys() == {"dense", "patched", "h2o"}
    assert rows["shift-rolled"]["perplexity"].keys() == {"dense"}
    nll = rows["sf"]["perplexity"]
    assert [len(nll["dense"][n]) for n in ("64", "128")] == [2, 2]
    assert nll["dense"]["128"] != nll["patched"]["128"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "results.jsonl"]
    assert "| shift-rolled | dense | 1 |" in capsys.readouterr().out
    page, drawn = tmp_path / "RESULTS.md", tmp_path / "results.png"
    page.write_text("Before.\n<!-- study:begin -->\nold\n<!-- study:end -->\nAfter.\n")
    assert reproduce.main([*words, *out, "--report", "--write", str(page), "--plot", str(drawn)]) == 0
    assert "| shift-rolled | dense | 1 |" in page.read_text()
    assert page.read_text().startswith("Before.")
    assert "old" not in page.read_text()
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert reproduce.main([*words, *out[:2], "--arms", "seco,spaco"]) == 0
    rows |= {row["arm"]: row for row in lines(tmp_path)[1:]}
    assert rows["seco"]["train_losses"] == pytest.approx(rows["full"]["train_losses"], rel=1e-5)  # exact gradients
    assert rows["spaco"]["settings"] == {"attention": "full", "chunk_size": 16, "keep_chunks": 0.25}
    with pytest.raises(ValueError, match=r"holds a run with training\.steps=2, this one has 3: take another --out"):
        reproduce.main([*words, *out, "--steps", "3"])
    with pytest.raises(ValueError, match=r"--arms: 'nothing' is not one of untuned, full, short, shift"):
        reproduce.main([*words, "--out", str(tmp_path), "--arms", "nothing"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--eval-text", "nothing.txt"], "nothing.txt"),
        (["--length", "3"], "sf: group_size=0 must be"),
        (["--length", "3", "--arms", "full"], r"lengths \[1, 3\] must be at least 2"),
        (["--passkeys", "1"], "passkey at 64 tokens: length 64 is too short"),
    ],
)
def test_what_could_not_be_evaluated_is_not_trained(reproduce, words, tmp_path, monkeypatch, changed, says):
    monkeypatch.setattr(study, "_one", lambda *_: pytest.fail("it was trained"))
    with pytest.raises((ValueError, OSError), match=says):
        reproduce.main([*words, *changed, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_report_reads_only(reproduce, tmp_path, monkeypatch, capsys):
    """Of whatever settings, and where there is nothing it makes nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"study.results.jsonl is missing or empty: name the folder"):
        reproduce.main(["--report"])
    assert not list(tmp_path.iterdir())
    begun = study.Study(training_cases.config(Path("base"), tmp_path), {}, lengths=(64,))
    store = Store(tmp_path / "study", begun.header())
    assert reproduce.main(["--report"]) == 0
    assert capsys.readouterr().out == "nothing was measured yet in study\n"
    facts = {"train_seconds": None, "train_losses": [], "peak_gib": None, "passkey": {}}
    store.add("sf/0", {"arm": "sf", "seed": 0, **facts, "perplexity": {"dense": {"64": [3.0, 3.1]}}})
    with store.path.open("ab") as file:
        file.write(b'{"key": "sf/1", "ar')  # of a run that is not done writing
    before = store.path.read_bytes()
    assert reproduce.main(["--report", "--length", "128"]) == 0
    assert "| sf | dense | 1 | 21." in capsys.readouterr().out
    assert store.path.read_bytes() == before
    Store(tmp_path / "eval", {"tasks": ["passkey"]})
    with pytest.raises(ValueError, match=r"eval holds results of `lcpatch eval`, not of a study"):
        reproduce.main(["--report", "--out", "eval"])


def test_the_published_command_goes_on_with_the_published_runs(reproduce):
    """RESULTS.md says how its runs were made, and that the same command makes those that are missing."""
    recipes = ROOT / "recipes"
    page = (recipes / "RESULTS.md").read_text()
    command = re.search(r"python recipes/reproduce.py (.*?)\n(?=python)", page, re.DOTALL)
    args = reproduce.parse(shlex.split(command[1].replace("\\\n", " "), comments=True))
    assert {"schema": 1, **reproduce.study(args).header()} == lines(recipes / args.out.name)[0]


def test_half_precision_weights(words, tmp_path, monkeypatch):
    """As on a GPU: bf16 weights, trained and untrained, are evaluated without autocast."""
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path / "cache"))
    config = training_cases.config(Path(words[1]), tmp_path, dtype="bfloat16", documents="joined", steps=1)
    arms = {"untuned": {}, "sf": {"attention": "sf", "options": {"group_size": 32}}}
    found = study.run(study.Study(config, arms, (0,), None, (48,), 2, 0), tmp_path / "out")
    losses = found.rows["sf/0"]["perplexity"]
    assert losses["dense"] != losses["patched"]
    assert all(5 < nll < 8 for way in losses.values() for nll in way["48"])  # log 512 = 6.2: it knows next to nothing


def made_up(runs: dict[str, dict[int, float]]) -> list[str]:
    """The report's lines of a study of one length: what each (arm, seed) loses over the same eight windows."""
    store = Store(None, {"lengths": [64]})
    windows = np.random.default_rng(0).normal(3, 0.1, 8)
    facts = {"train_seconds": 1.0, "train_losses": [], "peak_gib": None, "passkey": {}}
    for arm, seeds in runs.items():
        for seed, extra in seeds.items():
            nll = {"dense": {"64": (windows + extra).tolist()}}
            store.add(f"{arm}/{seed}", {"arm": arm, "seed": seed, **facts, "perplexity": nll})
    return study_report.summary(store).splitlines()


def line_of(arm: str, lines: list[str]) -> str:
    return next(line for line in lines if line.startswith(f"| {arm} "))


def test_recovery_follows_from_the_rows():
    """Of made-up losses: an arm a quarter of the way from full to short, in nats."""
    level = {"full": 0.0, "short": 0.4, "sf": 0.1}
    table = made_up({"untuned": {0: 1.0}} | {arm: dict.fromkeys(range(3), extra) for arm, extra in level.items()})
    line = line_of("sf", table)
    assert "nats 90%" in line
    assert "nats 75%" in line
    short = line_of("short", table)
    assert "nats 60%" in short
    assert short.count("nats") == 1  # from itself there is no gap to recover
    assert "nats" not in line_of("full", table)


def test_recovery_is_of_the_seeds_that_both_have():
    """Seeds differ by more than arms: an arm against another arm's other seeds would recover anything at all."""
    full = {0: 0.0, 1: 0.5, 2: -0.5, 3: 9.0}
    table = made_up({
        "untuned": {0: 5.0},
        "full": full,
        "short": {seed: full[seed] + 0.4 for seed in (1, 2, 3)},
        "sf": {seed: full[seed] + 0.1 for seed in (0, 1, 2)},
        "s2": {1: 0.5 + 0.1, 3: 9.0 + 0.3},
        "shift": {0: 0.1},
    })  # fmt: skip
    sf, s2 = line_of("sf", table), line_of("s2", table)
    assert "(100% to 100%; nats 98%) |" in sf  # from interpolation: all three
    assert "nats 75%; 2 seeds)" in sf  # from short: of seeds 1 and 2
    share = (math.exp(0.4) - math.exp(0.1)) / (math.exp(0.4) - 1)
    assert f"(by seed {share:.0%} and {share:.0%}; nats 75%; 2 seeds)" in sf
    share = [(math.exp(0.4) - math.exp(extra)) / (math.exp(0.4) - 1) for extra in (0.1, 0.3)]
    assert f"(by seed {share[0]:.0%} and {share[1]:.0%}; nats 50%) |" in s2
    assert "nats" not in line_of("shift", table)  # one run says nothing of its chance
