"""Context parallelism in transformers' Trainer: the rows of a group's ranks, one after the other, each by all of them.

What is computed is what plain data parallelism computes on the same rows: every process reads its own, and a step has
as many. But no process ever holds more of a row than its share. DistributedDataParallel or FSDP2 around it see ordinary
processes whose gradients they average: FSDP2's weights are in as many pieces as there are processes, across all groups.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ...core.errors import ParallelError
from ..fused import fused_loss
from .model import Parallel


class ParallelMixin:
    """Puts steps by a group in front of a Trainer's; `ranks` is the parallelized model's group, None: nothing changes.

    Raises:
        ParallelError: a Trainer in DeepSpeed, or that divides a loss by something else than its targets.
    """

    ranks: Parallel | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of the group's rows; returns this rank's part of their losses, detached."""
        if self.ranks is None:
            return super().training_step(model, inputs, num_items_in_batch)
        _check(self, model, num_items_in_batch)
        model.train()  # before the row is cut: after an evaluation a pattern of training would seem off
        loss = torch.zeros((), device=self.args.device)
        batches = self.ranks.pool(inputs)
        for n, batch in enumerate(batches):
            chunks = getattr(self, "chunkwise", None) is not None  # which are cut before ranks share them
            part = batch if chunks else self.ranks.shard(batch, num_items=num_items_in_batch)
            with self._unsynced(model) if n + 1 < len(batches) else nullcontext():
                loss += super().training_step(model, part, num_items_in_batch)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of this process's own rows, to which all ranks of the group contribute."""
        if self.ranks is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not prediction_loss_only:
            raise ParallelError("ranks hold parts of the logits; set prediction_loss_only=True")
        losses = []
        for batch in self.ranks.pool(inputs):
            part = self._prepare_inputs(self.ranks.shard(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                count = part.pop("num_items_in_batch")
                if self._fuses:
                    loss = fused_loss(model, part, count)
                else:
                    loss = model(**part, num_items_in_batch=count).loss
            losses.append(self.ranks.total(loss))
        return losses[self.ranks.rank], None, None

    def _unsynced(self, model: nn.Module) -> AbstractContextManager:
        """Around a backward that is not the step's last; FSDP2 would hold whole gradients instead of pieces."""
        return nullcontext() if isinstance(model, FSDPModule) else self.accelerator.no_sync(model)


def group_of(context_parallel: int) -> dist.ProcessGroup:
    """The group of this process: `context_parallel` neighbours. A collective of all processes.

    Raises:
        ParallelError: processes that do not divide into such groups.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % context_parallel:
        raise ParallelError(
            f"context_parallel={context_parallel} does not divide the {world} process{'es' * (world > 1)} of this run: "
            f"accelerate launch --config_file recipes/configs/ddp.yaml --num_processes {context_parallel} starts "
            "enough (on a machine without GPUs, not without that file)"
        )
    groups = [dist.new_group(range(n, n + context_parallel)) for n in range(0, world, context_parallel)]
    return groups[dist.get_rank() // context_parallel]


def _check(trainer: Any, model: nn.Module, num_items: Any) -> None:
    if not isinstance(model, DistributedDataParallel | FSDPModule):
        raise ParallelError(
            f"context parallelism runs in DistributedDataParallel or FSDP2, not in {type(model).__name__}: take "
            "recipes/configs/ddp.yaml or fsdp2.yaml as accelerate's config"
        )
    if num_items is None or not trainer.args.average_tokens_across_devices:
        raise ParallelError(
            "context parallelism divides the loss by the targets of all processes: set "
            "average_tokens_across_devices=True, and use a model whose loss takes num_items_in_batch"
        )
