"""The words of `lcpatch bench`: what is wrong is said at once, before a GPU is asked for, and nothing is touched."""

import io
import shlex
import sys

import pytest

from lcpatch.bench import cache, record
from lcpatch.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cache --tasks 32768", "'32768' is not BATCH:TOKENS"),
        ("cache --tasks 1:32768,0:9", "'0:9' is not BATCH:TOKENS"),
        ("cache --tasks 1:100,1:100", "'1:100' is there twice"),
        ("cache --arms 'H2O 0.2,compiled'", "Did you mean 'H2O 0.2, compiled'?"),
        ("cache --arms 'DynamicCache; DynamicCache'", "'DynamicCache' is there twice"),
        ("cache --arms 'DynamicCache;'", "'' is not one of 'DynamicCache'"),
        ("cache --append", "--append keeps what a file holds: give that file as --out"),
        ("cache --out .", "--out . is a folder"),
        ("model --tasks prefill:0", "'prefill:0' is not prefill:TOKENS, train:TOKENS, decode:TOKENS"),
        ("model --tasks reading:9", "'reading:9' is not prefill:TOKENS"),
        ("training --part a,z", "'z' is not one of 'a', 'b', 'c', 'd', 'e', 'f', 'g'"),
        ("training --part a,a", "'a' is there twice"),
        ("training --length 9000", "--length and --offload are for parts f and g, and --part has neither"),
        ("training --part a,b --offload", "--length and --offload are for parts f and g"),
        ("attention --patterns s2", "'s2' is not one of 's2 64/16/16'"),
        ("attention --heads 31", "31 query heads must be a multiple of the 8 KV heads"),
        ("decode --patterns 'sf N/4'", "groups that are a share of the length have no next token"),
        ("tune --kernels dv", "'dv' is not one of 'fwd', 'dq', 'dkdv', 'mass'"),
        ("tables x.json", "its name must start with its kind"),
        ("tables kernels/results/decode-x.json --plot x.png", "draws the result of `lcpatch bench attention`"),
    ],
)
def test_what_is_wrong_is_said(words: str, message: str, capsys):
    assert main(["bench", *shlex.split(words)]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cache --limit 0", "'0' is not a number of seconds above 0"),
        ("cache --limit nan", "'nan' is not a number of seconds above 0"),
        ("cache --layers 0", "'0' is not a whole number above 0"),
        ("training --part f --length 0", "'0' is not a whole number above 0"),
        ("attention --lengths 8192,12k", "'12k' is not a whole number above 0"),
        ("parallel --ranks 0", "'0' is not a whole number above 0"),
        ("cache --cachs H2O", "unrecognized arguments: --cachs H2O"),
        ("tables", "the following arguments are required: results"),
        ("tables x.json --write README.md --check README.md", "not allowed with argument"),
    ],
)
def test_what_argparse_says(words: str, message: str, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *words.split()])
    assert message in capsys.readouterr().err


def test_a_result_of_another_kind_makes_no_table(tmp_path, capsys):
    file = tmp_path / "cache-x.json"
    file.write_text('{"rows": [{"part": "a", "arm": "FA2", "length": 9, "why": null}]}')
    assert main(["bench", "tables", str(file)]) == 2
    assert "is no result of the kind that its name says, cache: it has no 'batch'" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_what_it_measured_and_says_where(stop, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache-tiny.json"
    bench = ["bench", "cache", "--tiny", "--tasks", "1:100", "--out", str(out)]
    assert main([*bench, "--arms", "Cluster 0.2"]) == 0
    measured = cache.measured

    def stopping(model, arm, *args):
        if arm.name == "H2O 0.2":
            raise stop
        return measured(model, arm, *args)

    monkeypatch.setattr(cache, "measured", stopping)
    asked = [*bench, "--append", "--arms", "DynamicCache; H2O 0.2"]
    if stop is KeyboardInterrupt:
        assert main(asked) == 130
    else:
        with pytest.raises(RuntimeError):
            main(asked)
    assert [row["arm"] for row in record.read(out)["rows"]] == ["DynamicCache", "Cluster 0.2"]
    assert capsys.readouterr().out.endswith(f"written to {out}\n")
    capsys.readouterr()
    asked[-1] = "no such arm"
    assert main(asked) == 2
    assert "written" not in capsys.readouterr().out


def test_what_was_said_is_seen_at_once(monkeypatch):
    """A run that is killed has not flushed a pipe."""
    piped, seen, measured = io.StringIO(), [], cache.measured
    piped.flush = lambda: seen.append(piped.getvalue())

    def watched(model, arm, *args):
        seen.append(seen[-1])
        return measured(model, arm, *args)

    monkeypatch.setattr(cache, "measured", watched)
    monkeypatch.setattr(sys, "stdout", piped)
    assert main(["bench", "cache", "--tiny", "--tasks", "1:100", "--arms", "DynamicCache; H2O 0.2"]) == 0
    assert [text.count("ms/token") for text in seen] == [0, 0, 1, 1, 2, 2]
