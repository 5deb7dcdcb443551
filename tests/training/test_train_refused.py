"""What a run refuses, and when: before data is read, before its folder is taken, before a weight is changed."""

from pathlib import Path

import pytest
from training_cases import run

from lcpatch.core.errors import TrainingError
from lcpatch.training import sources
from lcpatch.training.checkpoints import RUN_FILE

FAST = {"attention": "full", "steps": 4, "save_every": 2, "eval_rows": 0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": {"nothing": 1}, "attention": "sf"}, "sf has no option 'nothing'"),
        ({"sinks": "nothing"}, "sinks='nothing' must be"),
        ({"parallel": "nothing"}, "'nothing'.*halo, lightseq, ring"),
    ],
)
def test_settings_that_fit_no_model_are_told_before_data_is_read(base, tmp_path: Path, monkeypatch, settings, says):
    monkeypatch.setattr(sources, "read_texts", lambda names: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=says):
        run(base, tmp_path / "run", **FAST | settings)
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit_the_model_take_no_folder(base, tmp_path: Path):
    """So that the mended command does not find another run there."""
    for settings in ({"dense": "nothing"}, {"attention": "s2", "layers": (7,)}):
        with pytest.raises(ValueError, match=r"nothing|layers: there is no layer 7"):
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
