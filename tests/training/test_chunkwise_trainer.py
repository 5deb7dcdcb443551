"""Trainer, accelerate and DistributedDataParallel: the same steps as without chunks, and one exchange of gradients."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from chunkwise_cases import assert_same, chunked, far, plain, rounding, taken
from models import build, tokens
from noise import FACTOR
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import lcpatch
from lcpatch.training import spaco
from lcpatch.training.chunkwise_trainer import ChunkwiseTrainer

ROOT = Path(__file__).parents[2]


class Texts(torch.utils.data.Dataset):
    """Eight texts of two lengths, some tokens of each without a label."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        ids = tokens(1, 50, seed=n)[0]
        labels = ids.clone()
        labels[: 5 * n] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(folder: Path, chunkwise: dict | None, **settings) -> tuple[dict, list[float]]:
    """What three optimizer steps move each parameter by, and the losses that were logged."""
    model = build("gpt_neox").double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        optim="sgd",  # its steps are linear in the gradient: rounding is not blown up by a square root
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **settings,
    )
    trainer = ChunkwiseTrainer(model, arguments, train_dataset=Texts(), chunkwise=chunkwise)
    assert isinstance(trainer, Trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, losses


def rounding_of_the_loss() -> float:
    """transformers computes its loss in fp32, whatever the model's dtype; chunks leave float64 as it is."""
    model, ids = build("gpt_neox").double().train(), tokens(2)
    model(ids, labels=ids, use_cache=False).loss.backward()
    error = far(taken(model), plain(model, ids, ids)[1])
    assert 0 < error < 1e-5
    return FACTOR * error


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    ],
    ids=["accumulated and clipped", "plain"],
)
def test_trainer_takes_the_same_steps(settings: dict, tmp_path: Path):
    want, losses = trained(tmp_path, None, **settings)
    got, logged = trained(tmp_path, {"chunk_size": 16}, **settings)
    assert far(got, want) <= 3 * rounding_of_the_loss()  # three steps
    assert len(losses) == 3
    assert logged == pytest.approx(losses, abs=1e-4)  # transformers rounds what it logs


def test_trainer_passes_options_on(tmp_path: Path):
    seen = []

    def plan(count: int) -> spaco.Plan:
        seen.append(count)
        return spaco.seco(count)

    trained(tmp_path, {"chunk_size": 16, "estimator": plan}, per_device_train_batch_size=2)
    assert seen == [4] * 3  # 49 tokens that have a next one


def test_trainer_draws_by_seed_step_backward_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Never twice the same; and the same again in another run, whatever else takes random numbers there."""
    plans = []
    draw = spaco.draw
    monkeypatch.setattr(spaco, "draw", lambda *args: plans.append(draw(*args)) or plans[-1])
    options = {"chunk_size": 4, "estimator": "bernoulli", "keep": 0.5}
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trained(tmp_path, options, **settings)
    first, plans[:] = plans[:], []
    assert len({plan.kept for plan in first}) == len(first) == 6
    torch.manual_seed(3)
    trained(tmp_path, options, **settings)
    assert plans == first
    plans.clear()
    trained(tmp_path, options, seed=1, **settings)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    trained(tmp_path, options, **settings)
    assert len({plan.kept for plan in first + plans}) == 18


def test_trainer_scales_what_a_grad_scaler_will_unscale(tmp_path: Path):
    """fp16's loss scale: on the gradients, not on the loss that is returned."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model = build("gpt_neox").double()
    trainer = ChunkwiseTrainer(model, arguments, train_dataset=Texts(), chunkwise={"chunk_size": 16})
    trainer.current_gradient_accumulation_steps = 1
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model.zero_grad()
        trainer.accelerator.scaler = scaler
        loss = trainer.training_step(model, {name: x[None] for name, x in Texts()[1].items()})
        results.append((loss, taken(model)))
    (loss, grads), (same, scaled) = results
    assert loss == same
    assert all(torch.equal(1024 * g, scaled[name]) for name, g in grads.items())


def test_trainer_refuses(tmp_path: Path):
    class OwnLoss(ChunkwiseTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    def make(chunkwise: dict | None, kind: type = ChunkwiseTrainer, **settings):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)
        kind(build(), arguments, train_dataset=Texts(), chunkwise=chunkwise)

    with pytest.raises(ValueError, match="'size'"):
        make({"size": 3})
    with pytest.raises(ValueError, match="chunk_size in tokens"):
        make({"keep": 0.5})
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make({"chunk_size": 16}, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        make({"chunk_size": 16}, neftune_noise_alpha=5)
    with pytest.raises(ValueError, match=r"OwnLoss\.compute_loss"):
        make({"chunk_size": 16}, OwnLoss)
    make(None, OwnLoss, neftune_noise_alpha=5)


@pytest.mark.parametrize("attention", ["own", "lcpatch"])
def test_accelerate_in_mixed_precision(attention: str):
    """accelerate puts autocast into the model's own forward: the error is what a plain backward's is there."""
    model, ids = build().train(), tokens(2)
    exact = plain(model, ids, ids)[1]
    AcceleratorState._reset_state(reset_partial_state=True)  # the Trainers before this test left one in fp32
    mixed = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with lcpatch.patched(mixed, "sink", window=10**6) if attention == "lcpatch" else nullcontext():
        budget = 2 * far(plain(mixed, ids, ids)[1], exact)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert 0 < far(chunked(mixed, ids, ids, 16, attention=attention)[1], exact) <= budget


@pytest.fixture
def process_group(tmp_path: Path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_gradients_are_exchanged_once(process_group):
    """After the last chunk, and not at all in a step that is accumulated."""
    model, ids = build("gpt_neox").double().train(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    replica = DistributedDataParallel(model)
    exchanged = []

    def count(state, bucket):
        exchanged.append(bucket.index())
        return allreduce_hook(None, bucket)

    replica.register_comm_hook(None, count)
    loss, got = chunked(replica, ids, ids, 16)
    assert_same((loss, {name.removeprefix("module."): g for name, g in got.items()}), want, allowed)
    assert exchanged == list(range(len(exchanged)))
    assert exchanged
    exchanged.clear()
    with replica.no_sync():
        chunked(replica, ids, ids, 16)
    assert not exchanged
    none = spaco.bernoulli((False,) * 5, 0.5)
    _, got = chunked(replica, ids, ids, 16, estimator=lambda n: none)
    assert exchanged  # the others wait for it
    assert not any(g.any() for g in got.values())


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels/torch-ext", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "chunkwise_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
