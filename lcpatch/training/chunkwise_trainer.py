"""`transformers.Trainer` whose steps go through `chunkwise.backward`; nothing else of it changes."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .chunkwise import backward
from .spaco import coins

OPTIONS = ("chunk_size", "estimator", "keep", "offload", "attention")


class ChunkwiseMixin:
    """Puts `training_step` in front of a Trainer's: `class MyTrainer(ChunkwiseMixin, Trainer)`.

    Gradient accumulation, accelerate (DistributedDataParallel, fp16's scaler, autocast) and gradient clipping work as
    they do there, and the loss that is logged has the same meaning. Evaluation is the Trainer's own.

    Args:
        chunkwise: `chunk_size` and, if wanted, `estimator`, `keep`, `offload`, `attention` of `chunkwise.backward`;
            None trains as the Trainer does. What SpaCO draws follows from the Trainer's seed, the step, the backward
            within it and the process, so that a run that goes on from a checkpoint draws what it would have drawn.

    Raises:
        ValueError: an unknown option, or a Trainer's setting that chunks cannot honour.
    """

    def __init__(self, *args: Any, chunkwise: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunkwise = None if chunkwise is None else dict(chunkwise)
        if self.chunkwise is not None:
            _check(self, self.chunkwise)
            self._backwards = _Backwards()
            self.add_callback(self._backwards)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; returns its loss, detached, in the Trainer's normalisation."""
        if self.chunkwise is None:
            return super().training_step(model, inputs, num_items_in_batch)
        place = self.args.seed, self.state.global_step, next(self._backwards.numbers), self.args.process_index
        options = {**self.chunkwise, "generator": coins(*place)}
        return training_step(self, model, inputs, num_items_in_batch, options)


class _Backwards(TrainerCallback):
    """Numbers the backwards of each step."""

    def __init__(self) -> None:
        self.numbers = count()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.numbers = count()


class ChunkwiseTrainer(ChunkwiseMixin, Trainer):
    """transformers' Trainer with `ChunkwiseMixin`."""


def training_step(
    trainer: Trainer,
    model: nn.Module,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None,
    options: dict[str, Any],
) -> Tensor:
    """`trainer.training_step` by `chunkwise.backward`, for trainers that do not use the mixin."""
    model.train()
    if callable(switch := getattr(trainer.optimizer, "train", None)):  # schedule-free optimizers
        switch()
    inputs = trainer._prepare_inputs(inputs)
    scale = 1.0
    divides = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    if not divides:
        num_items_in_batch = None
        scale /= trainer.current_gradient_accumulation_steps
    elif trainer.args.average_tokens_across_devices:  # DistributedDataParallel takes the mean, this undoes it
        scale *= trainer.accelerator.num_processes
    scaler = trainer.accelerator.scaler
    one = torch.ones((), device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss = backward(
            model,
            **inputs,
            num_items_in_batch=num_items_in_batch,
            grad_scale=scale if scaler is None else scale * scaler.scale(one),
            **options,
        )
    return loss * scale


def _check(trainer: Trainer, options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"chunkwise={{{unknown[0]!r}: …}} is not one of {', '.join(OPTIONS)}")
    if not isinstance(options.get("chunk_size"), int):
        raise ValueError(f"chunkwise needs a chunk_size in tokens, such as 2048; got {options.get('chunk_size')!r}")
    args = trainer.args
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    wrong = {
        f"{owner.__name__}.compute_loss": owner.__module__.partition(".")[0] not in ("transformers", "lcpatch"),
        "neftune_noise_alpha, whose noise follows the length": args.neftune_noise_alpha,
        "label_smoothing_factor": args.label_smoothing_factor,
        "compute_loss_func": trainer.compute_loss_func,
        "deepspeed": getattr(trainer, "is_deepspeed_enabled", False),
        "fsdp": getattr(trainer, "is_fsdp_enabled", False),
        "n_gpu > 1 (DataParallel)": args.n_gpu > 1,
        "a LOMO optimizer": "lomo" in str(args.optim),
    }
    if found := [name for name, value in wrong.items() if value]:
        raise ValueError(f"chunkwise training cannot honour {found[0]}; leave it out, or leave chunkwise out")
