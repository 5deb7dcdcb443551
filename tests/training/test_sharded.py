"""FSDP2 and DeepSpeed on real gloo processes: the losses, gradients and files of a run whose weights are whole."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_cases
from launched import FAST, ROOT, Runs, accelerate, apart, logged
from models import SHORT
from noise import FACTOR, distance, model_budget
from safetensors.torch import load_file
from sharded_cases import train_everywhere
from transformers import AutoModelForCausalLM
from world import run_world

import lcpatch
from lcpatch.training.sharded import ShardedMixin

RECIPE = [str(ROOT / "recipes" / "sinklora.py"), *FAST, "--sinks", "logit:-3"]
CASES = [
    {"patch": {"method": "sf", **SHORT["sf"]}, "strategy": "halo", "lora": True, "checkpoint": True},
    {"patch": {"method": "sink", **SHORT["sink"], "sinks": "logit:-1"}, "strategy": "halo"},
    {"strategy": "ring", "lora": True},
    {"strategy": "tokenring", "checkpoint": True},
]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"), RECIPE)


@pytest.fixture(scope="module")
def wide_runs(tmp_path_factory) -> Runs:
    base = training_cases.base(tmp_path_factory.mktemp("wide"), hidden_size=252)
    return Runs(base, tmp_path_factory.mktemp("wide-runs"), RECIPE)


@pytest.fixture(scope="module")
def sharded(runs) -> Path:
    return runs("fsdp2", accelerate("fsdp2", 2), "--merged", "--save-every", "8", "--keep", "3")


def rounding(runs: Runs) -> float:
    """How far apart the same steps may come out: as far as another order of the same sums puts them."""
    whole, in_turn = runs("ddp", accelerate("ddp", 2)), runs("in turn", [sys.executable], "--accumulate", "2")
    return FACTOR * max(apart(in_turn, whole), torch.finfo(torch.float32).eps * max(logged(whole, "loss")))


def form(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


def interrupted(runs: Runs, run: Path, name: str) -> Path:
    """That run as it was after its checkpoint of step 16."""
    copied = runs.folder / name
    shutil.copytree(run, copied)
    for gone in ("checkpoint-20", "model", "merged"):
        shutil.rmtree(copied / gone)
    (copied / "log.json").unlink()
    return copied


def assert_same(run: Path, other: Path) -> None:
    assert len(logged(run, "loss")) == 20
    assert apart(run, other) == 0
    for file in ("adapter_model.safetensors", "lcpatch.safetensors"):
        ours, theirs = load_file(run / "model" / file), load_file(other / "model" / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_pieces_train_as_whole_weights_do(runs, sharded):
    """As DistributedDataParallel trains."""
    whole = runs("ddp", accelerate("ddp", 2))
    other_rows = runs("other rows", [sys.executable], "--accumulate", "2", "--seed", "1")
    assert len(logged(sharded, "loss")) == 20
    assert apart(sharded, whole) <= rounding(runs) < apart(other_rows, whole)


@pytest.mark.slow
def test_what_is_saved_has_one_process_form(runs, sharded):
    """Adapter, sink logits and their config; and it was in pieces: the checkpoint has FSDP's own state."""
    alone = runs("in turn", [sys.executable], "--accumulate", "2")
    assert (sharded / "checkpoint-16" / "pytorch_model_fsdp.bin").is_file()
    names = sorted(p.name for p in (sharded / "model").iterdir())
    assert names == sorted(p.name for p in (alone / "model").iterdir())
    for file in (p for p in names if p.endswith(".safetensors")):
        ours, theirs = load_file(sharded / "model" / file), load_file(alone / "model" / file)
        assert form(ours) == form(theirs)
    configs = [json.loads((run / "model" / "adapter_config.json").read_text()) for run in (sharded, alone)]
    for config in configs:
        config["target_modules"].sort()  # a set, in the order of the day
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_what_is_saved_comes_back(sharded, base):
    """The merged model is the adapter's, and both are the one that was evaluated, not the base."""
    adapter = lcpatch.from_pretrained(sharded / "model")
    merged = lcpatch.from_pretrained(sharded / "merged")
    ids = training_cases.ids()
    allowed = model_budget(lcpatch.remove(copy.deepcopy(merged)), ids)
    assert distance(adapter(ids).logits, merged(ids).logits) <= allowed
    untrained = AutoModelForCausalLM.from_pretrained(base)
    assert distance(untrained(ids).logits, merged(ids).logits) > allowed
    checkpoint, final = (load_file(sharded / p / "adapter_model.safetensors") for p in ("checkpoint-20", "model"))
    assert checkpoint.keys() == final.keys()
    assert all(torch.equal(checkpoint[name], final[name]) for name in final)


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly(runs, sharded):
    """From its checkpoint of step 16, with the losses and to the adapter of the run that was not interrupted."""
    again = interrupted(runs, sharded, "again")
    runs(again.name, accelerate("fsdp2", 2), "--merged", "--save-every", "8", "--keep", "3")
    assert_same(again, sharded)


@pytest.mark.slow
def test_one_unit_holds_bf16_and_fp32(runs, sharded):
    """Frozen bf16 and trained fp32 weights: no farther from fp32 than whole weights of these dtypes are, give or take.

    Another policy, such as accelerate's own, would round the losses themselves to bf16.
    """
    half = runs("fsdp2 in bf16", accelerate("fsdp2", 2), "--dtype", "bfloat16")
    whole = runs("ddp in bf16", accelerate("ddp", 2), "--dtype", "bfloat16")
    assert apart(half, sharded) <= FACTOR * apart(whole, sharded)
    assert logged(half, "loss")[0] == logged(whole, "loss")[0]  # before anything was trained nothing differs
    saved = load_file(half / "model" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_full_tuning_in_pieces(runs):
    """Every weight in pieces; what is saved is a plain model."""
    ours, theirs = (runs(f"{c}, full", accelerate(c, 2), "--tune", "full") for c in ("fsdp2", "ddp"))
    assert apart(ours, theirs) <= rounding(runs)
    saved = [load_file(run / "model" / "model.safetensors") for run in (ours, theirs)]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.slow
def test_rows_shared_among_sharded_processes(runs):
    """Two groups of two processes, each sharing its rows, over weights in four pieces."""
    shared = runs("shared", accelerate("fsdp2", 4), "--context_parallel", "2")
    in_turn = runs("four in turn", [sys.executable], "--accumulate", "4")
    assert apart(shared, in_turn) <= rounding(runs) < apart(runs("ddp", accelerate("ddp", 2)), in_turn)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_saves_and_goes_on(wide_runs, stage: int):
    """As DistributedDataParallel; stage 3 leaves weights below 100,000 numbers whole, so the model has larger ones."""
    pytest.importorskip("deepspeed")
    whole = wide_runs("ddp", accelerate("ddp", 2))
    more = ["--merged", "--save-every", "8", "--keep", "3"]
    ours = wide_runs(f"stage {stage}", accelerate(f"deepspeed{stage}", 2), *more)
    assert (ours / "checkpoint-16" / "zero_to_fp32.py").is_file()
    assert apart(ours, whole) <= rounding(wide_runs)
    saved = {p: load_file(ours / p / "adapter_model.safetensors") for p in ("checkpoint-20", "model")}
    theirs = load_file(whole / "model" / "adapter_model.safetensors")
    assert form(saved["model"]) == form(theirs)
    assert all(torch.equal(saved["checkpoint-20"][name], saved["model"][name]) for name in theirs)
    ids = training_cases.ids()
    adapter, merged = (lcpatch.from_pretrained(ours / p) for p in ("model", "merged"))
    assert distance(adapter(ids).logits, merged(ids).logits) <= model_budget(lcpatch.remove(copy.deepcopy(merged)), ids)
    again = interrupted(wide_runs, ours, f"stage {stage} again")
    wide_runs(again.name, accelerate(f"deepspeed{stage}", 2), *more)
    assert_same(again, ours)


@pytest.mark.slow
def test_gradients_of_shared_rows_and_pieces_are_one_process_s():
    """In float64, on a mesh of two groups by two ranks."""
    for answer in run_world(4, train_everywhere, CASES):
        assert answer == [], answer


def test_the_first_fsdp_is_refused():
    class Trainer:
        def create_accelerator_and_postprocess(self) -> None:
            self.is_fsdp_enabled = True
            self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))

    class Sharded(ShardedMixin, Trainer):
        pass

    with pytest.raises(ValueError, match="fsdp_version: 1 cannot hold LoRA beside frozen weights; set fsdp_version: 2"):
        Sharded().create_accelerator_and_postprocess()
