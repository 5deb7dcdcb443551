"""Training runs on a GPU: bf16 weights, the Triton kernels, selective recomputation, offloading, exact resumption."""

from pathlib import Path

import models
import pytest
import torch
import training_cases
from noise import FACTOR
from training_cases import run

from lcpatch.hf.sinks import is_sink
from lcpatch.training.model import checkpointing_settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARMS = {
    "full": {"attention": "full"},
    "short": {"attention": "short"},
    "shift": {"attention": "shift"},
    "sf": {"attention": "sf", "sinks": "logit:-3"},
    "s2": {"attention": "s2", "options": {"local_blocks": 2, "stride": 4}},
    "prefix": {"attention": "s2", "options": {"local_blocks": 2, "stride": 4}, "sinks": "prefix:4"},
    "chunks": {"attention": "full", "chunk_size": 200},
}
FAST = {"length": 1000, "steps": 20, "eval_rows": 1}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(base: Path, tmp_path: Path, name: str):
    result = run(base, tmp_path, **FAST, **ARMS[name])
    wide = {n for n, p in result.model.named_parameters() if p.dtype == torch.float32}  # afterwards the rest is bf16
    assert wide == {n for n, _ in result.model.named_parameters() if "lora_" in n or is_sink(n)}
    assert sum(result.losses[-5:]) < sum(result.losses[:5]) - 1
    assert result.metrics["eval_dense_loss"] > 0


@pytest.mark.parametrize("documents", ["masked", "joined"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_is_kept_changes_no_loss(base: Path, tmp_path: Path, checkpointing: str, documents: str):
    """What is computed again is what was: losses differ no more than those of two equal runs."""
    settings = {**FAST, "steps": 4, "eval_rows": 0, "attention": "sf", "documents": documents}
    want, again = (run(base, tmp_path / name, **settings, checkpointing="none").losses for name in "ab")
    got = run(base, tmp_path / "c", **settings, checkpointing=checkpointing, offload=True).losses

    def apart(losses: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(losses, want, strict=True))

    assert apart(got) <= FACTOR * max(apart(again), torch.finfo(torch.float32).eps * max(want))


def test_what_a_forward_holds():
    """Of eight layers: with selective recomputation attention's results more than with full, all else less."""
    held = {}
    for kind in ("none", "selective", "full"):
        model, ids = models.build(num_hidden_layers=8).cuda().bfloat16().train(), models.tokens(1, 16000).cuda()
        if kind != "none":
            settings = checkpointing_settings(kind)
            name = next(name for name in settings if not name.endswith("_kwargs"))
            getattr(model, f"{name}_enable")(settings[f"{name}_kwargs"])
        before = torch.cuda.memory_allocated()
        loss = model(ids, labels=ids, use_cache=False).loss
        held[kind] = torch.cuda.memory_allocated() - before
        del loss
    attention = 8 * ids.shape[1] * 4 * (16 * 2 + 4)  # out in bf16 and LSE in fp32, of 4 heads of 16
    assert held["full"] + 0.9 * attention < held["selective"] < held["none"] / 2, held


def test_memory_is_saved(tmp_path: Path):
    """A run's peak as its log says it, of eight layers, so that it is their memory."""
    base, peaks = training_cases.base(tmp_path / "base", num_hidden_layers=8), {}
    for name, settings in {
        "none": {"checkpointing": "none"},
        "full": {"checkpointing": "full"},
        "chunks": {"checkpointing": "none", "chunk_size": 1024},
    }.items():
        torch.cuda.empty_cache()
        fixed = {"length": 16000, "steps": 2, "eval_rows": 0, "attention": "full", "rope": "linear"}
        log = run(base, tmp_path / name, **fixed, **settings).log
        peaks[name] = max(line["peak_gib"] for line in log if "peak_gib" in line)
    assert max(peaks["full"], peaks["chunks"]) < peaks["none"], peaks
