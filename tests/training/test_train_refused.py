"""What a run refuses, and when: before data is read, before its folder is taken, before a weight is changed."""

import importlib
import json
import shutil
from pathlib import Path

import eval_cases
import pytest
import training_cases
import transformers
from training_cases import run

from lcpatch.core.errors import TrainingError
from lcpatch.training import sources
from lcpatch.training.checkpoints import RUN_FILE
from lcpatch.training.model import load_tokenizer, why_documents_meet
from lcpatch.training.run import datasets

FAST = {"attention": "full", "steps": 4, "save_every": 2, "eval_rows": 0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": {"nothing": 1}, "attention": "sf"}, "sf has no option 'nothing'"),
        ({"sinks": "nothing"}, "sinks='nothing' must be"),
        ({"parallel": "nothing"}, "'nothing'.*halo, lightseq, ring"),
        ({"attention": "sf", "chunk_size": 40}, "give a fixed --group-size, such as 24, and no --wrap"),
        (
            {"attention": "shift", "options": {"group_size": 24, "wrap": True}, "chunk_size": 40},
            "its groups follow the length of the row, which a chunk does not see",
        ),
    ],
)
def test_settings_that_fit_no_model_are_told_before_data_is_read(base, tmp_path: Path, monkeypatch, settings, says):
    monkeypatch.setattr(sources, "read_texts", lambda names: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=says):
        run(base, tmp_path / "run", **FAST | settings)
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit_the_model_take_no_folder(base, tmp_path: Path):
    """So that the mended command does not find another run there."""
    dynamic = {"attention": "full", "length": 600, "rope": "dynamic", "chunk_size": 40}
    for settings in ({"dense": "nothing"}, {"attention": "s2", "layers": (7,)}, dynamic):
        with pytest.raises(ValueError, match=r"nothing|layers: there is no layer 7|or leave --chunk-size out"):
            run(base, tmp_path, **FAST | settings)
        assert not list(tmp_path.iterdir())
    assert run(base, tmp_path, **FAST).finished


def test_a_run_that_saved_nothing_may_be_deleted(base, tmp_path: Path):
    with pytest.raises(TrainingError, match="became"):
        run(base, tmp_path, **FAST | {"learning_rate": 1e30, "save_every": 0})
    with pytest.raises(
        ValueError, match=r"learning_rate=1e\+30, .*: delete it, as nothing was saved there, or take the"
    ):
        run(base, tmp_path, **FAST)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"learning_rate=1e\+30, .*: take another --output, or take the same settings"):
        run(base, tmp_path, **FAST)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_record_of_a_run_that_cannot_be_read(base, tmp_path: Path, content: str):
    (tmp_path / RUN_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"run.json does not say which run the folder holds: take another --output"):
        run(base, tmp_path, **FAST)


def test_documents_that_would_meet(base, tmp_path: Path):
    """A state that goes on from token to token knows no documents: texts are joined, and chats have a row each."""
    sizes = {"vocab_size": eval_cases.VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"])
    folder = shutil.copytree(base, tmp_path / "hybrid")
    (folder / "model.safetensors").unlink()
    transformers.Lfm2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lfm2: layers of kind conv carry a state .*: say --documents joined"):
        run(folder, tmp_path / "run", **FAST)
    run(folder, tmp_path / "run", **FAST, documents="joined")
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"prompt": "How?", "completion": "So."}) + "\n") * 7)
    for model, rows in ((folder, 7), (base, 1)):
        settings = training_cases.config(model, tmp_path, task="sft", data=(str(data),), eval_rows=0)
        packs = why_documents_meet(settings) is None
        assert len(datasets(settings, load_tokenizer(settings), packs)[0]) == rows


# Checkpoints, models and data that are not what they should be


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("kept", [None, 0, 100])
def test_a_damaged_checkpoint_is_told_and_can_be_done_without(stopped, base, tmp_path: Path, file: str, kept):
    """A file that is missing, empty, or cut short."""
    output = Path(shutil.copytree(stopped, tmp_path / "run"))
    damaged = output / "checkpoint-4" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if kept is not None:
        damaged.write_bytes(content[:kept])
    with pytest.raises(
        TrainingError, match=r"checkpoint-4 cannot be read \(.*; delete it to go on from the checkpoint"
    ):
        run(base, output, **FAST | {"steps": 6})
    shutil.rmtree(output / "checkpoint-4")
    assert len(run(base, output, **FAST | {"steps": 6}).losses) == 6 - 2


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory) -> Path:
    """A run that was killed after step 4 of 6."""
    output = tmp_path_factory.mktemp("stopped")
    run(base, output, **FAST | {"steps": 6, "keep": 3})
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-6")
    return output


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "is no folder with a model in it: it has no config.json"),
        (["adapter_config.json"], "holds an adapter: name a model with it merged, as --merged writes one"),
        (["config.json"], "its tokenizer cannot be loaded; save one in the model's folder"),
    ],
)
def test_folders_without_a_model(base, tmp_path: Path, monkeypatch, files, says):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in files:
        (folder / file).write_text((base / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    for name in (folder, Path("folder")):
        with pytest.raises((ValueError, OSError), match=says):
            run(name, tmp_path / "run", **FAST)


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_a_step_without_labels_is_told_before_it_is_taken(base, tmp_path: Path, chunk_size: int):
    """Rows of two tokens: in one of three a document begins in the middle, so that nothing follows anything."""
    data = tmp_path / "short.jsonl"
    data.write_text((json.dumps({"text": "a"}) + "\n") * 100)
    with pytest.raises(
        TrainingError, match=r"none of the tokens of step \d predicts a label, .* take a longer --length"
    ):
        run(base, tmp_path / "run", **FAST | {"steps": 9}, length=2, data=(str(data),), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("retrieval", ["--steps", "-3"], "--steps -3 must be at least 1"),
        ("retrieval", ["--length", "0"], "length=0 must be at least 2 tokens"),
        ("retrieval", ["--length", "64", "--page", "0"], "page=0 must be at least 1"),
        ("retrieval", ["--out", "/dev/null/x"], "/dev/null"),
        ("retrieval", ["--out", "."], "--out . is a folder; name the file to write, such as ./bookmarks"),
        ("reproduce", ["--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_recipes_beside_the_four(base, tmp_path: Path, monkeypatch, recipe: str, words: list[str], says: str):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=says):
        importlib.import_module(recipe).main(["--model", str(base), *words])


def test_an_output_that_can_be_no_folder(base, tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"cannot be made a folder \(.*\); take another --output"):
            run(base, output, **FAST)


def test_evaluation_data_that_is_too_short_is_named(base, tmp_path: Path):
    (tmp_path / "one.txt").write_text("One line.")
    with pytest.raises(ValueError, match=r"--eval-data: the data has \d+ tokens, and a row 96"):
        run(base, tmp_path / "run", **FAST | {"eval_rows": 2}, eval_data=(str(tmp_path / "one.txt"),))
