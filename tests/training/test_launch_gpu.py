"""Recipes on several GPUs, a process each: the losses of one GPU that takes the same rows in turn."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import training_cases
from launched import FAST, ROOT, Runs, accelerate, apart, logged
from noise import FACTOR, distance, model_budget

import lcpatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.xdist_group("launch on two GPUs"),
]

RECIPE = [str(ROOT / "recipes" / "sinklora.py"), *FAST, "--length", "256", "--sinks", "logit:-3"]
FIXED = ("--group-size", "64")  # what runs by chunks can have: groups that do not follow the row's length
RANKS = ("--context_parallel", "2")
LAUNCHED = {
    "as accelerate finds it": (None, ()),
    "ddp": ("ddp", ()),
    "fsdp2": ("fsdp2", ()),
    "deepspeed2": ("deepspeed2", ()),
    "deepspeed3": ("deepspeed3", ()),
    "shared": ("ddp", RANKS),
    "shared, fsdp2": ("fsdp2", RANKS),
    "chunks": ("ddp", ("--chunk_size", "96")),
    "shared chunks": ("ddp", (*RANKS, "--chunk_size", "96")),
}
EXACT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    # Wide, as DeepSpeed's stage 3 leaves weights below 100,000 numbers whole.
    base = training_cases.base(tmp_path_factory.mktemp("wide"), hidden_size=288)
    return Runs(base, tmp_path_factory.mktemp("runs"), [*RECIPE, *FIXED], "0,1")


def in_turn(runs: Runs, *more: str) -> Path:
    """One process; it sees both GPUs and takes the first."""
    return runs(" ".join(("in turn", *more)), [sys.executable], "--accumulate", "2", *more)


def launched(runs: Runs, name: str, *more: str) -> Path:
    config, settings = LAUNCHED[name]
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    launch = accelerate(config, 2) if config else [sys.executable, "-m", "accelerate.commands.launch"]
    return runs(" ".join((name, *more)), launch, *settings, *more)


@pytest.mark.parametrize("name", LAUNCHED)
def test_two_gpus_train_as_one(runs, name: str):
    """In fp32, as far apart as another order of the same sums puts them."""
    want = in_turn(runs, *EXACT)
    at_once = runs("at once", [sys.executable], "--batch-size", "2", *EXACT)
    other_rows = runs("other rows", [sys.executable], "--accumulate", "2", "--seed", "1", *EXACT)
    assert len(logged(want, "loss")) == 20
    allowed = FACTOR * max(apart(at_once, want), torch.finfo(torch.float32).eps * max(logged(want, "loss")))
    assert apart(launched(runs, name, *EXACT), want) <= allowed < apart(other_rows, want)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed3", "shared", "shared chunks"])
def test_two_gpus_train_in_bf16(runs, name: str):
    """Through the kernels; what is saved is the model that was trained, as an adapter and merged."""
    run = launched(runs, name, "--merged")
    losses = logged(run, "loss")
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert apart(run, in_turn(runs, *EXACT)) <= FACTOR * apart(in_turn(runs), in_turn(runs, *EXACT))
    adapter, merged = (lcpatch.from_pretrained(run / p) for p in ("model", "merged"))
    ids = training_cases.ids()
    assert distance(adapter(ids).logits, merged(ids).logits) <= model_budget(lcpatch.remove(copy.deepcopy(merged)), ids)
