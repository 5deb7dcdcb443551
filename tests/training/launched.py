"""Recipes as programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def accelerate(config: str, processes: int) -> list[str]:
    """`accelerate launch` with a config that the recipes ship, on a port that is free."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    file = ROOT / "recipes" / "configs" / f"{config}.yaml"
    return [*launch, "--config_file", str(file), "--num_processes", str(processes)]


def logged(output: Path, *keys: str) -> list[float]:
    """What a run's log says under these keys, in order."""
    lines = json.loads((output / "log.json").read_text())
    return [line[key] for key in keys for line in lines if key in line]


class Runs:
    """Runs of one recipe, by name; each is made once.

    Args:
        base: the model's folder.
        folder: where the runs are written.
        recipe: the command's words, without model and output.
        devices: the GPUs that a run sees; none of them: gloo, wherever this runs.
    """

    def __init__(self, base: Path, folder: Path, recipe: list[str], devices: str = "") -> None:
        self.base, self.folder, self.recipe, self.devices = base, folder, recipe, devices

    def __call__(self, name: str, launch: list[str], *more: str) -> Path:
        output = self.folder / name
        if not (output / "model").is_dir():
            command = [*launch, *self.recipe, "--model", str(self.base), "--output", str(output), *more]
            finished(command, environment(self.folder, CUDA_VISIBLE_DEVICES=self.devices))
        return output


def apart(a: Path, b: Path) -> float:
    """How far the losses and evaluations of two runs are apart."""
    keys = ("loss", "eval_dense_loss", "eval_patched_loss")
    return max(abs(x - y) for x, y in zip(logged(a, *keys), logged(b, *keys), strict=True))
