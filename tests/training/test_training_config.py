"""Settings: where they come from, what goes before what, and what is refused."""

import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from torch import distributed

from lcpatch.cli import main
from lcpatch.cli.train import recipe_module
from lcpatch.core.errors import UnknownNameError
from lcpatch.training import recipe
from lcpatch.training.arms import patch_for
from lcpatch.training.config import TrainConfig, load
from lcpatch.training.run import Result

ROOT = Path(__file__).parents[2]
RECIPES = ["sinklora", "longlora", "s2", "chunkwise"]
CONFIGS = sorted(p for p in (ROOT / "recipes" / "configs").glob("*.yaml"))


def test_command_line_before_yaml_before_recipe_before_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\nlearning_rate: 2e-5\nlayers: [0, 3]\noptions: {num_sinks: 8}\n")
    made = load(["--config", str(file), "--steps", "9", "--group-size", "64"], {"steps": 5, "seed": 4, "rope": "yarn"})
    assert (made.steps, made.seed, made.rope, made.batch_size) == (9, 4, "yarn", 1)
    assert made.learning_rate == 2e-5  # which YAML reads as text
    assert made.layers == (0, 3)
    assert made.options == {"num_sinks": 8, "group_size": 64}
    assert load(["--layers", "1,2"]).layers == (1, 2)
    assert load(["--layers", "every_2", "--data", "a", "b", "--no-merged"]).data == ("a", "b")
    assert TrainConfig.from_dict(made.to_dict()) == made


def test_another_arm_goes_without_what_is_the_others(tmp_path):
    """Whoever names it: a file over a recipe, or the command line over both. What is repeated there stays."""
    recipe_ = {"attention": "s2", "layers": "every_2", "options": {"stride": 8}}
    for words, want in [
        ([], ({"stride": 8}, "every_2")),
        (["--attention", "s2"], ({"stride": 8}, "every_2")),
        (["--attention", "full"], ({}, None)),
        (["--attention", "sf", "--group-size", "64", "--layers", "1"], ({"group_size": 64}, (1,))),
    ]:
        made = load(words, recipe_)
        assert (made.options, made.layers) == want, words
        patch_for(made.attention, made.options, made.layers)
    file = tmp_path / "c.yaml"
    file.write_text("attention: shift\noptions: {wrap: true}\nseed: 3\n")
    made = load(["--config", str(file)], recipe_)
    assert (made.attention, made.options, made.layers) == ("shift", {"wrap": True}, None)
    with pytest.warns(UserWarning, match=r"c.yaml: options={'wrap': True} left out, because the command line says"):
        made = load(["--config", str(file), "--attention", "s2"], recipe_)
    assert (made.attention, made.options, made.layers, made.seed) == ("s2", {}, None, 3)
    patch_for(made.attention, made.options, made.layers)
    file.write_text("options: {num_sinks: 2}\n")  # of the arm that no one named, sf
    with pytest.warns(UserWarning, match="left out"):
        assert load(["--config", str(file), "--attention", "full"]).options == {}


def test_no_chunks_go_without_how_many_are_kept(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("chunk_size: 64\nkeep_chunks: 0.25\n")
    with pytest.warns(UserWarning, match=r"keep_chunks=0.25 left out"):
        assert load(["--config", str(file), "--chunk-size", "0"]).keep_chunks == 1
    with pytest.raises(ValueError, match=r"keep_chunks=0.5 needs chunks"):
        load(["--config", str(file), "--chunk-size", "0", "--keep-chunks", "0.5"])
    file.write_text("keep_chunks: 0.25\n")  # whose chunks the command line or a recipe makes
    assert load(["--config", str(file), "--chunk-size", "32"]).chunk_size == 32
    assert load(["--config", str(file)], {"chunk_size": 16}).keep_chunks == 0.25


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--steps", "many"], "steps='many' must be a whole number"),
        (["--steps", "1.5"], "steps='1.5' must be a whole number"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be above 0"),
        (["--learning-rate", "inf"], "learning_rate=inf must be a finite number"),
        (["--beta2", "1"], "beta2=1.0 must be at least 0, and below 1"),
        (["--lora-dropout", "1.5"], "lora_dropout=1.5 must be at least 0, and below 1"),
        (["--seed", "-1"], "seed=-1 must be a whole number from 0"),
        (["--tune", "qlora"], r"tune='qlora' is not one of lora\+, lora, full"),
        (["--keep-chunks", "0.5"], "keep_chunks=0.5 needs chunks: say chunk_size"),
        (["--config", "nothing.yaml"], "nothing.yaml is no file; --config names one with settings as YAML"),
        (
            ["--lerning-rate", "1e-3"],
            "'lerning_rate' is no setting, and no option of a method. Did you mean 'learning",
        ),
        (["--group-sise", "4"], "'group_sise' is no setting, and no option of a method. Did you mean 'group_size'"),
    ],
)
def test_wrong_values(words, says):
    with pytest.raises((ValueError, OSError), match=says):
        load(words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("stepps: 3", "unknown key 'stepps'. Did you mean 'steps'. Keys: accumulate, "),
        ("steps: 3\nlength: 8\nsteps: 4", "has 'steps' twice, of which YAML would take the last: delete one"),
        ("", "must hold `key: value` lines, not nothing"),
        ("- a", "must hold `key: value` lines, not list"),
        ("a: [", "is not valid YAML"),
        ("steps: true", "steps=True must be a whole number"),
        ("offload: 1", "offload=1 must be true or false"),
        ("options: 3", "options=3 must be a mapping"),
        ("layers: {a: 1}", "must be a list or text or none"),
        ("model: null", "model=None must be text"),
    ],
)
def test_wrong_files(tmp_path, content, says):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=says):
        load(["--config", str(tmp_path / "c.yaml")])


def test_every_setting_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        load(["--help"])
    shown = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert f.metadata["help"]
        assert f"--{f.name.replace('_', '-')}" in shown or f.name == "options"


# Arms


def test_arms():
    assert patch_for("full").mode == "never"
    assert patch_for("short").options == {"returned_fraction": 1.0, "num_sinks": 0}
    assert patch_for("s2", {"stride": 8}, layers="every_2").layers == "every_2"
    assert patch_for("sink").method == "sink"  # any registered method
    for words, says in [
        (("full", {"group_size": 4}), "attention='full' is dense: it takes no layers and no options"),
        (("short", {"num_sinks": 4}), "attention='short' sets num_sinks itself; take attention='sf'"),
        (("sf", {"nothing": 4}), "sf has no option 'nothing'; options: group_size"),
    ]:
        with pytest.raises(ValueError, match=says):
            patch_for(*words)
    with pytest.raises(UnknownNameError, match=r"longlora.* is ambiguous.*Beside them: full, short"):
        patch_for("longlora")


# Recipes and the command line


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_short_and_valid(name: str):
    module = recipe_module(name)
    made = load([], module.DEFAULTS, module.__doc__)
    patch_for(made.attention, made.options, made.layers, made.sinks)
    assert made.model == "demo"
    assert len((ROOT / "recipes" / f"{name}.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_configs_are_valid(file: Path):
    data = yaml.safe_load(file.read_text())
    if "compute_environment" in data:  # accelerate's own
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(str(file)).num_processes == 8
        return
    made = load(["--config", str(file)])
    patch_for(made.attention, made.options, made.layers, made.sinks)


def test_the_verb_knows_recipes_and_files(tmp_path, capsys):
    assert main(["train", "nope"]) == 2
    assert "'nope' is no recipe and no .yaml file; recipes: " in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("stepps: 3")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "unknown key 'stepps'" in capsys.readouterr().err
    assert main(["train", "sinklora", "--steps", "x"]) == 2
    assert "lcpatch train: the command line: steps='x' must be a whole number" in capsys.readouterr().err


def test_a_recipe_tells_a_users_error_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sinklora.py", "--config", "nothing.yaml"])
    with pytest.raises(SystemExit) as stopped:
        recipe.script(recipe_module("sinklora").main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sinklora.py: ")
    assert "nothing.yaml" in said
    assert len(said.splitlines()) == 1


def test_a_recipe_tells_of_a_file_without_the_systems_number(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        recipe.script(lambda: (tmp_path / "file" / "x").mkdir())
    assert capsys.readouterr().err == f"x.py: {tmp_path / 'file' / 'x'}: Not a directory\n"


def test_a_recipe_that_is_interrupted_says_so_in_a_sentence(monkeypatch, capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        recipe.script(interrupted)
    assert stopped.value.code == recipe.INTERRUPTED
    assert capsys.readouterr().err == "\nx.py: interrupted; the same command goes on from what was saved\n"


def test_a_recipe_warns_in_a_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        recipe.script(lambda: warnings.warn("3 records were left out", stacklevel=1) or 0)
    assert capsys.readouterr().err == "warning: 3 records were left out\n"


def test_a_summary_says_which_steps_its_losses_are_of():
    assert "2 steps, loss 3.0000 -> 2.0000" in recipe.summary(Result(None, [3.0, 2.0], step=2), "run")
    assert "steps 5 to 6, loss 3.0000 -> 2.0000" in recipe.summary(Result(None, [3.0, 2.0], step=6), "run")


def test_a_recipe_ends_its_group_before_python_ends():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(SystemExit) as stopped:
        recipe.script(lambda: recipe.STOPPED)
    assert stopped.value.code == recipe.STOPPED
    assert not distributed.is_initialized()
