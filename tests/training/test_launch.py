"""The recipes as programs: through `accelerate launch`, and on two processes."""

import copy
import re
import sys
from datetime import timedelta

import pytest
import torch
import training_cases
from accelerate import PartialState
from launched import FAST, ROOT, environment, finished, logged
from noise import FACTOR, distance, model_budget

import lcpatch


def test_accelerate_launch(base, tmp_path):
    """`accelerate launch` finds one process here; `--merged` writes what runs without an adapter."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    recipe = [str(ROOT / "recipes" / "sinklora.py"), "--model", str(base), "--output", str(tmp_path / "run"), *FAST]
    said = finished([*launch, *recipe, "--merged"], environment(tmp_path))
    first, last = map(float, re.search(r"20 steps, loss (\S+) -> (\S+)", said).groups())
    assert last < first - 0.2
    adapter = lcpatch.from_pretrained(tmp_path / "run" / "model")
    merged = lcpatch.from_pretrained(tmp_path / "run" / "merged")
    ids = training_cases.ids()
    allowed = model_budget(lcpatch.remove(copy.deepcopy(merged)), ids)
    assert distance(adapter(ids).logits, merged(ids).logits) <= allowed


def test_processes_wait_longer_for_one_another_than_nccl_does(base, tmp_path, monkeypatch):
    """The others wait while the first tokenizes; the Trainer's own half hour comes when the group is there already."""
    told = {}

    def init(**settings) -> None:
        told.update(settings)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for name, value in {**process, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    PartialState._reset_state()
    try:
        with pytest.raises(InterruptedError):
            training_cases.run(base, tmp_path / "run")
    finally:
        PartialState._reset_state()
    assert told["timeout"] >= timedelta(hours=1)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(base, tmp_path):
    """DDP on gloo sees the same rows in the same steps: its losses differ by the order of sums only.

    How much that is, another order tells: two rows one after another instead of at once.
    """
    recipe = [str(ROOT / "recipes" / "longlora.py"), "--model", str(base), *FAST]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    runs = {
        "at once": [sys.executable, *recipe, "--batch-size", "2"],
        "in turn": [sys.executable, *recipe, "--accumulate", "2"],
        "two": [*two, *recipe],
        "other rows": [sys.executable, *recipe, "--batch-size", "2", "--seed", "1"],
    }
    losses = {}
    for name, command in runs.items():
        output = tmp_path / name
        finished([*command, "--output", str(output)], environment(tmp_path, ACCELERATE_USE_CPU="true"))
        assert sorted(p.name for p in output.iterdir()) == ["log.json", "model", "run.json"]
        losses[name] = logged(output, "loss")
    assert {len(found) for found in losses.values()} == {20}
    at_once = losses["at once"]

    def apart(name: str) -> float:
        return max(abs(a - b) for a, b in zip(losses[name], at_once, strict=True))

    allowed = FACTOR * max(apart("in turn"), torch.finfo(torch.float32).eps * max(at_once))
    assert apart("two") <= allowed < apart("other rows")
