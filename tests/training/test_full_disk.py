"""A disk that is full: one sentence, whole checkpoints, and a run that goes on once there is room."""

import errno
import os
import resource
import subprocess
import sys

import pytest
from data_cases import texts
from launched import FAST, environment
from room import room_for
from training_cases import run

from lcpatch.caches.scorers import Bookmarks
from lcpatch.core.disk import why_unwritten
from lcpatch.core.errors import LcpatchError, TrainingError
from lcpatch.training import tokens, trainer
from lcpatch.training.checkpoints import STAGING, arriving, claim, resumed_from

SMALL = {"attention": "full", "tune": "lora", "lora_r": 1, "save_every": 2, "steps": 6, "eval_rows": 0}
"""An adapter that is smaller than its tokenizer."""


@pytest.mark.parametrize(
    ("file", "tune"),
    [("adapter_model.safetensors", "lora+"), ("tokenizer.json", "lora"), ("optimizer.pt", "lora+"), (None, "lora")],
)
def test_whatever_cannot_be_written_is_told_and_leaves_whole_checkpoints(base, tmp_path, monkeypatch, file, tune):
    """safetensors, tokenizers, torch and (None) Python each raise another error."""
    settings = SMALL | {"tune": tune}
    save, save_rng = trainer.LongTrainer._save_checkpoint, trainer.LongTrainer._save_rng_state

    def full(self, *args) -> None:
        limit = resource.RLIM_INFINITY
        if file and self.state.global_step == 4:
            limit = (tmp_path / "checkpoint-2" / file).stat().st_size - 1
        with room_for(limit):
            save(self, *args)

    def full_for_python(self, folder: str) -> None:
        if file is None and self.state.global_step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        save_rng(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.LongTrainer, "_save_checkpoint", full)
        patch.setattr(trainer.LongTrainer, "_save_rng_state", full_for_python)
        says = (
            r"the checkpoint of step 4 could not be written \(.* MiB are free in .*the last whole .*checkpoint-2\. Make"
        )
        with pytest.raises(TrainingError, match=says):
            run(base, tmp_path, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "run.json"]
    rest = run(base, tmp_path, **settings)
    assert (rest.finished, len(rest.losses)) == (True, 4)


FULL_FOR_ONE = """
import os, sys
import lcpatch
from lcpatch.training import recipe, trainer

save = trainer.LongTrainer._save_rng_state

def full(self, folder):
    if self.state.global_step == 4 and os.environ["RANK"] == "1":
        raise OSError(28, os.strerror(28), folder)
    save(self, folder)

trainer.LongTrainer._save_rng_state = full
recipe.script(lambda: recipe.main(None, {}, lcpatch.save_pretrained))
"""


@pytest.mark.slow
def test_a_part_that_one_process_cannot_write(base, tmp_path):
    """No checkpoint lacks it, and every process says what happened instead of waiting for the others."""
    (tmp_path / "recipe.py").write_text(FULL_FOR_ONE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518"]
    words = [*FAST, "--save-every", "2", "--model", str(base), "--output", str(tmp_path / "run")]
    env = environment(tmp_path, ACCELERATE_USE_CPU="true")
    command = [*launch, str(tmp_path / "recipe.py"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "checkpoint of step 4 could not be written (No space left" in done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "run.json"]


def test_a_model_that_cannot_be_written(base, tmp_path):
    """The steps are not lost: the same command writes it from the last checkpoint."""
    settings = SMALL | {"tune": "lora+"}
    run(base, tmp_path, **settings)
    size = (tmp_path / "model" / "adapter_model.safetensors").stat().st_size
    with room_for(size - 1), pytest.raises(TrainingError, match=r"model could not be written \(.*checkpoint-6"):
        run(base, tmp_path, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
        "log.json",
        "model",
        "run.json",
    ]


def test_tokens_that_cannot_be_written(tmp_path):
    """By safetensors' own error; nothing partial is left."""
    with room_for(200), pytest.raises(TrainingError, match=r"the tokens of the data could not be written \(.*os error"):
        texts(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.safetensors*"))
    assert len(texts(tmp_path))


def test_what_a_killed_run_left_takes_no_room(tmp_path):
    claim(tmp_path, {"steps": 8})
    (tmp_path / STAGING / "checkpoint-8").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run with steps=8"):
        resumed_from(tmp_path, {"steps": 9}, "auto")
    assert (tmp_path / STAGING).is_dir()  # which is not this run's
    assert resumed_from(tmp_path, {"steps": 8}, "auto") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


def test_other_errors_stay_what_they_are(tmp_path):
    assert why_unwritten(RuntimeError("CUDA out of memory"), tmp_path) is None
    with pytest.raises(KeyError), arriving(tmp_path / "x"):
        raise KeyError("x")
    with pytest.raises(KeyError):
        tokens._atomically(tmp_path / "x", lambda path: {}["x"])
    assert not list(tmp_path.iterdir())


def test_bookmarks_are_whole_or_as_they_were(tmp_path):
    file, bookmarks = tmp_path / "bookmarks.safetensors", Bookmarks(2, 2, 8)
    bookmarks.save(file)
    before = file.read_bytes()
    with room_for(100), pytest.raises(LcpatchError, match="could not be written, what was there is untouched"):
        bookmarks.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
