"""What launches a run: a launcher that ends, and the same command launched in another way, or twice."""

import fcntl
import shutil
from itertools import chain, repeat
from pathlib import Path

import pytest
from training_cases import SETTINGS, run

import lcpatch.training.run
from lcpatch.training import trainer
from lcpatch.training.checkpoints import alone_in
from lcpatch.training.sharded import launched_as

SHORT = SETTINGS["longlora"] | {"steps": 4, "save_every": 2, "eval_rows": 0}


def test_a_run_stops_when_its_launcher_is_gone(base, tmp_path: Path, monkeypatch):
    """`accelerate launch` of one process ends at SIGTERM without a word to what it launched; a shell may end."""
    parents = chain([1, 1], repeat(2))
    monkeypatch.setattr(trainer.os, "getppid", lambda: next(parents))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stopped = run(base, tmp_path / "launched", **SHORT)
    assert (stopped.finished, stopped.step) == (False, 2)
    assert (tmp_path / "launched" / "checkpoint-2").is_dir()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert run(base, tmp_path / "alone", **SHORT).finished


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"processes": 2}, "processes=1, this one has 2"),
        ({"weights": "fsdp"}, "weights='whole', this one has 'fsdp'"),
    ],
)
def test_a_run_launched_otherwise_is_refused(base, tmp_path: Path, monkeypatch, now: dict, says: str):
    """Its steps would have other rows, or its checkpoints other files; not so where only the model is to be written."""
    run(base, tmp_path, **SHORT)
    monkeypatch.setattr(lcpatch.training.run, "launched_as", lambda: {"processes": 1, "weights": "whole", **now})
    assert run(base, tmp_path, **SHORT).losses == []
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=f"holds a run with {says}: take another --output"):
        run(base, tmp_path, **SHORT)


def test_two_runs_at_once_are_refused(base, tmp_path: Path, monkeypatch):
    """They would write over each other's checkpoints; once the first has ended, however it did, the next goes on."""
    with alone_in(tmp_path / "run"):
        with pytest.raises(
            ValueError, match=r"another process trains in .*run now: wait for it, or take another --out"
        ):
            run(base, tmp_path / "run", **SHORT)
        assert list((tmp_path / "run").iterdir()) == []
    assert run(base, tmp_path / "run", **SHORT).finished

    def no_locks(*args) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*\): see to it that no other run writes there"):
        run(base, tmp_path / "elsewhere", **SHORT)


@pytest.mark.parametrize(
    ("environment", "weights"),
    [
        ({}, "whole"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "deepspeed3"),
    ],
)
def test_how_weights_are_kept(monkeypatch, environment: dict, weights: str):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == {"processes": 1, "weights": weights}
