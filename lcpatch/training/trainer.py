"""The one glue to transformers' Trainer: what long-context training needs that it does not do by itself.

Speed in tokens and peak memory in every log line; evaluation of the model dense and under its pattern; a loss that is
not a number stops the run before it reaches a weight; SIGTERM leaves a checkpoint from which the run goes on exactly;
a checkpoint is whole or absent.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..core.errors import TrainingError
from ..hf.models import unwrap
from ..hf.state import SINK_LOGIT
from . import arms
from .checkpoints import STAGING, TRAINER_STATE_NAME, discard, load_sinks, reading, save_sinks, sinks_of, writing
from .chunkwise_trainer import ChunkwiseMixin
from .fused import can_fuse, fused_loss
from .parallel.trainer import ParallelMixin
from .sharded import ShardedMixin
from .support import RandomState

MODES = {"dense": "never", "patched": "always"}
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""What `accelerate launch` sets for whatever it launches."""


class LongTrainer(ParallelMixin, ChunkwiseMixin, ShardedMixin, Trainer):
    """transformers' Trainer for patched models and packed rows.

    Args:
        offload: keep what waits for the backward pass in the host's memory (torch's `save_on_cpu`).
        **kwargs: as for `Trainer`, and `chunkwise` as for `ChunkwiseMixin`.
    """

    def __init__(self, *args: Any, offload: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offload = offload
        self._speed = _Speed()
        self.losses: list[float] = []
        """The loss of every step of this process's session, unrounded."""
        self._step_loss = 0.0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        # Where parameters are in pieces (FSDP, DeepSpeed) only the model's own forward may put them together.
        whole = self.accelerator.distributed_type in ("NO", "MULTI_GPU", "MULTI_CPU")
        self._fuses = whole and can_fuse(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, without a cache: with one, packed documents would see each other."""
        inputs = {**inputs, "use_cache": False}
        if not self._fuses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss = fused_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the items are those of all processes, which are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward.

        Raises:
            TrainingError: the loss is not a finite number. (Its gradient's norm is looked at before a step is made.)
        """
        with self._saved_tensors():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss += self._finite("loss", float(loss))
        if self.accelerator.sync_gradients:
            self.losses.append(self._step_loss)
            self._step_loss = 0.0
        self._speed.add(inputs["input_ids"].numel() * self.args.world_size)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """The batches of a step.

        Raises:
            TrainingError: none of their tokens predicts a label, so that the mean loss would be 0 / 0.
        """
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches and num_items is not None and not int(num_items):
            raise TrainingError(
                f"none of the tokens of step {self.state.global_step + 1} predicts a label, as where every document in "
                "its rows is one token long: take a longer --length, or data with longer texts"
            )
        return batches, num_items

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._finite("gradient's norm", float(norm))
        return norm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without sink logits: like a bias, one has no reason to be small, and 0 is far from where it begins."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(SINK_LOGIT)]

    def _finite(self, what: str, value: float) -> float:
        if math.isfinite(value):
            return value
        raise TrainingError(
            f"the {what} became {value} at step {self.state.global_step + 1}; no weight was changed by it. Lower "
            "--learning-rate, take --dtype float32, or look at that row of the data; checkpoints so far are in "
            f"{self.args.output_dir}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second since the last line, and the most memory a GPU held."""
        if "loss" in logs:
            logs |= self._speed.facts()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Every metric twice: `eval_dense_…` and, if there is a pattern, `eval_patched_…` with it on.

        The random numbers of training go on as if there had been no evaluation, whose loaders draw some.
        """
        metrics: dict[str, float] = {}
        state = RandomState([self.args.device])
        for name, mode in MODES.items():
            if mode == "always" and unwrap(self.model).config.lcpatch["mode"] == "never":
                continue
            with arms.running(self.model, mode):
                metrics |= super().evaluate(*args, metric_key_prefix=f"{metric_key_prefix}_{name}", **kwargs)
        state.restore()
        self._speed.restart()
        self._evaluated = self.state.global_step, metrics
        return metrics

    def evaluated(self) -> dict[str, float]:
        """The metrics of the last step, which may have been evaluated already."""
        step, metrics = self._evaluated
        return metrics if step == self.state.global_step else self.evaluate()

    def _saved_tensors(self) -> AbstractContextManager:
        if not self._offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    # Checkpoints. Trainer writes into `_get_output_dir() / checkpoint-N`; ours is a folder that no one looks into.

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = folder / STAGING
        if self.is_world_process_zero():
            discard(staging)
        self.accelerator.wait_for_everyone()
        try:
            with writing(f"the checkpoint of step {self.state.global_step}", folder):
                self._write_checkpoint(model, trial)
                if self.is_world_process_zero():
                    discard(folder / name)
                    os.replace(staging / name, folder / name)
        finally:
            if self.is_world_process_zero():
                discard(staging)
        if self.is_world_process_zero():
            rotate_checkpoints(str(folder), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Every process's part; if one fails, all do, so that no checkpoint lacks a part."""
        try:
            super()._save_checkpoint(model, trial)
        except Exception:
            if not self.in_pieces:  # else the others may wait in a collective of the weights, and end with this process
                anywhere(True, self.args)
            raise
        if anywhere(False, self.args):
            raise OSError("another process could not write its part, and says why")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        sinks = sinks_of(self.model)  # a collective where they are in pieces
        if self.args.should_save:
            save_sinks(sinks, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_sinks(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            if not self.in_pieces:
                self._wants(checkpoint, "optimizer.pt", "scheduler.pt")
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            one = self.args.world_size == 1
            self._wants(checkpoint, "rng_state.pth" if one else f"rng_state_{self.args.process_index}.pth")
            super()._load_rng_state(checkpoint)

    @staticmethod
    def _wants(checkpoint: str | None, *files: str) -> None:
        """Stop where transformers would go on without: with a new optimizer, or other random numbers."""
        if checkpoint is not None and (missing := [f for f in files if not (Path(checkpoint) / f).is_file()]):
            raise FileNotFoundError(f"{missing[0]} is missing")

    def take(self, checkpoint: Path) -> None:
        """Stand where a finished run stood, without the one more step that `train` takes.

        Raises:
            TrainingError: weights are in pieces, which only `train` puts together.
        """
        if self.in_pieces:
            raise TrainingError(
                f"{checkpoint} is of the last step, so nothing is left to train. Should its model be missing, run the "
                "same command on one process without FSDP or DeepSpeed"
            )
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def anywhere(here: bool, args: Any) -> bool:
    """Whether something is so on any of the processes; a collective."""
    if args.world_size == 1:
        return here
    flag = torch.tensor(float(here), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


class StopOnSignal(TrainerCallback):
    """After SIGTERM: finish the step, write a checkpoint, stop. All processes stop at the same step.

    `accelerate launch` of one process passes SIGTERM on to no one: it ends, and what it launched would go on unseen. So
    that the launcher is gone means the same.
    """

    def __init__(self) -> None:
        self.asked = False
        self._launcher = os.getppid() if LAUNCHED in os.environ else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM while the block runs; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at what was asked of any process."""
        self.asked = anywhere(self.asked or self._launcher not in (None, os.getppid()), args)
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class _Speed:
    """Tokens per second and peak memory since the last look."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def facts(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        found = {"tokens_per_second": round(self._tokens / max(seconds, 1e-9), 1)}
        if torch.cuda.is_available():
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.restart()
        return found
