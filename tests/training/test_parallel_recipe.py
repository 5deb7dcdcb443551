"""A recipe whose processes share their rows trains as one whose processes have a row each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from noise import FACTOR

from lcpatch.core.errors import ParallelError
from lcpatch.training.config import TrainConfig, load
from lcpatch.training.parallel.trainer import group_of

ROOT = Path(__file__).parents[2]
FAST = ["--steps", "10", "--length", "97", "--learning-rate", "5e-3", "--warmup", "0", "--save-every", "0"]


def launched(base: Path, cache: Path, name: str, *more: str, processes: int = 2) -> dict[str, list[float]]:
    """Losses and evaluations of a recipe."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "LCPATCH_CACHE": str(cache)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    recipe = [str(ROOT / "recipes" / "sinklora.py"), "--model", str(base), "--output", str(cache / name), *FAST, *more]
    env = {**os.environ, "PYTHONPATH": paths, **fixed}
    done = subprocess.run([*launch, *recipe], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    log = json.loads((cache / name / "log.json").read_text())
    assert (cache / name / "model").is_dir()
    return {key: [line[key] for line in log if key in line] for key in ("loss", "eval_dense_loss", "eval_patched_loss")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--chunk_size", "33", "--group-size", "24", "--layers", "every_2")], ids=["whole", "by chunks"]
)
def test_sharing_rows_changes_nothing_but_the_order_of_sums(base, tmp_path, more: tuple[str, ...]):
    runs = {
        "apart": launched(base, tmp_path, "apart", *more),
        "shared": launched(base, tmp_path, "shared", "--context_parallel", "2", *more),
        "in turn": launched(base, tmp_path, "in turn", "--accumulate", "2", *more, processes=1),
        "other rows": launched(base, tmp_path, "other rows", "--seed", "1", *more),
    }
    want = runs["apart"]
    assert len(want["loss"]) == 10
    assert len(want["eval_patched_loss"]) == 1

    def apart(name: str) -> float:
        pairs = [(a, b) for key in want for a, b in zip(runs[name][key], want[key], strict=True)]
        return max(abs(a - b) for a, b in pairs)

    # Another order of the same sums tells how much that may be, ten steps on.
    allowed = FACTOR * max(apart("in turn"), torch.finfo(torch.float32).eps * max(want["loss"]))
    assert apart("shared") <= allowed < apart("other rows")


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ParallelError, match=r"the 1 process of this run: .*configs/ddp\.yaml --num_processes 2 starts"):
        group_of(2)
    with pytest.raises(ValueError, match="chunk_size=3 must be at least 4"):
        TrainConfig(context_parallel=4, chunk_size=3)
    with pytest.raises(ValueError, match=r"offload with chunk_size=64 keeps keys .* context_parallel=2 cannot"):
        TrainConfig(context_parallel=2, chunk_size=64, offload=True)
    assert load(["--context_parallel", "4"]).context_parallel == load(["--context-parallel", "4"]).context_parallel == 4
