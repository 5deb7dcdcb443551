"""`lcpatch eval` from the command line, with a tiny saved model."""

import json
import shlex

import pytest
from eval_cases import DOCUMENTS, model, tokenizer

from lcpatch.cli import main
from lcpatch.cli._options import parse_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "text").mkdir()
    (path / "text" / "a.txt").write_text(DOCUMENTS[0], encoding="utf-8")
    return path


def failure(capsys, *argv):
    assert main(["eval", *map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_whole_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = (
        f"eval {folder} --tasks perplexity,passkey --lengths 300 --text {folder / 'text'} --max-windows 2 --depths 1 "
        f"--digits 3 --seeds 1 --method s2 --block-size 16 --local-blocks 1 --stride 3 --cache s2 --out {out} "
    )
    assert main([*words.split(), "--arm", "sink --window 9"]) == 0
    printed = capsys.readouterr().out
    label = "s2(block_size=16, local_blocks=1, stride=3) + s2 cache"
    assert f"- Arms: dense, {label}, sink(window=9);" in printed
    assert "passkey: a number hidden in nonsense" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"]["passkey"]["digits"] == 3
    assert shlex.split(report["command"]) == ["lcpatch", *words.split(), "--arm", "sink --window 9"]
    assert report["tasks"]["perplexity"]["max_windows"] == 2
    assert len((out / "results.jsonl").read_text().splitlines()) == 1 + 3 * (2 + 1)


def test_a_number_may_begin_with_its_point():
    assert parse_options(["--budget", ".2"]) == {"budget": 0.2}


def test_list(capsys):
    assert main(["eval", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("perplexity", "passkey", "needle", "vt", "topic", "multiturn"):
        assert f"\n{name} " in f"\n{listed}"
    assert "digits=5" in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say which MODEL"),
        ("./nothing", "./nothing is no folder with a model in it"),
        ("MODEL --tasks nope", "unknown task 'nope'. Choices:"),
        ("MODEL --tasks ,", "no task was named"),
        ("MODEL --method nope", "unknown attention method 'nope'"),
        ("MODEL --cache nope", "unknown cache 'nope'"),
        ("MODEL --cache s2 --lengths 100", "S2Cache needs a model patched with s2"),
        ("MODEL --no-dense", "--no-dense leaves nothing to measure"),
        ("MODEL --digits 7", "no option 'digits' in perplexity"),
        ("MODEL --method s2 --strid 7", "no option 'strid'"),
        ("MODEL --protocol mine", "protocol='mine' is not one of longlora, sliding"),
        ("MODEL --seeds 0", "--seeds 0 must be at least 1"),
        ("MODEL --text nothing.txt", "nothing.txt: No such file or directory"),
        ("MODEL --lengths 5000", "length 5000 is beyond the 4096 positions"),
        ("MODEL --lengths 100 --chat", "no chat template"),
    ],
)
def test_refusals(words, message, folder, capsys):
    assert message in failure(capsys, *words.replace("MODEL", str(folder)).split())


def test_lengths_are_numbers(folder, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--lengths", "4k"])
    assert "'4k' is not a whole number above 0" in capsys.readouterr().err
