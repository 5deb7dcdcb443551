"""The recipes as programs: through `accelerate launch`, and on two processes."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_cases
from noise import FACTOR, distance, model_budget

import lcpatch

ROOT = Path(__file__).parents[2]
FAST = ["--steps", "20", "--length", "96", "--learning-rate", "5e-3", "--warmup", "0", "--save-every", "0"]


def environment(cache: Path, **more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    fixed = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LCPATCH_CACHE": str(cache)}
    return {**os.environ, **fixed, **more}


def finished(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
        losses[name] = [line["loss"] for line in json.loads((output / "log.json").read_text()) if "loss" in line]
    assert {len(found) for found in losses.values()} == {20}
    at_once = losses["at once"]

    def apart(name: str) -> float:
        return max(abs(a - b) for a, b in zip(losses[name], at_once, strict=True))

    allowed = FACTOR * max(apart("in turn"), torch.finfo(torch.float32).eps * max(at_once))
    assert apart("two") <= allowed < apart("other rows")
