"""Weights that every process holds a piece of (FSDP2, DeepSpeed): what accelerate and transformers' Trainer leave open.

Under FSDP2 what is trained is fp32 beside frozen weights of another dtype, also inside one unit; each travels as it is,
and gradients are reduced in fp32. The arithmetic is that of DistributedDataParallel, so that the losses are, too.
DeepSpeed casts in its own way, but keeps what is trained in fp32 as well, and that is what is saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMixin:
    """Puts sharding in front of a Trainer's methods; without it nothing changes.

    Raises:
        ValueError: FSDP's first version, whose flat parameters mix neither dtypes nor frozen and trained weights.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs, too, and by the weights' own dtypes."""
        _take_cpus()
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version: {plugin.fsdp_version} cannot hold LoRA beside frozen weights; set fsdp_version: 2, as "
                "in recipes/configs/fsdp2.yaml"
            )
        # accelerate's would round fp32 weights, their gradients on the way and the loss itself to bf16.
        plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """What accelerate wraps around a model's forward, but not under FSDP2."""
        if not (self.is_fsdp_enabled and self.args.bf16):
            return super().autocast_smart_context_manager(cache_enabled)
        # A cache would keep the bf16 form of whole weights until the step is over.
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def whole(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The trained model in one piece, without accelerate's wrappers; a collective.

        Args:
            load: makes the model as it was before training. Of weights in pieces the main process alone puts the
                trained ones together, in the host's memory, in a new model; the others return theirs as it is.
        """
        if not self.in_pieces:
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        trained = _fsdp_trained(self.model) if self.is_fsdp_enabled else _deepspeed_trained(self.model)
        if not self.is_world_process_zero():
            return self.model
        model = load()
        for name, parameter in trained_of(model).items():
            parameter.data.copy_(trained[name])
        return model

    @property
    def in_pieces(self) -> bool:
        """Whether processes hold pieces of what is trained."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def launched_as() -> dict[str, Any]:
    """How many processes there are, and how they keep the weights, by what accelerate was told."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    weights = "whole"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        weights = "fsdp"
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        weights = "deepspeed" + os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return {"processes": PartialState().num_processes, "weights": weights}


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, under each of their names."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def whole_tensor(parameter: Tensor) -> Tensor:
    """A parameter's numbers, in the host's memory; a collective where it is in pieces."""
    numbers = parameter.detach()
    return (numbers.full_tensor() if isinstance(numbers, DTensor) else numbers).cpu().contiguous()


def put_tensor(parameter: Tensor, numbers: Tensor) -> None:
    """Set a parameter to numbers that every process has; a collective where it is in pieces."""
    if isinstance(parameter, DTensor):
        numbers = distribute_tensor(numbers.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.data.copy_(numbers)


def _fsdp_trained(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def _deepspeed_trained(model: nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trained = {name: safe_get_full_fp32_param(p).cpu() for name, p in trained_of(model).items()}
    unset_hf_deepspeed_config()  # or the next model would be loaded in pieces
    return trained


def _take_cpus() -> None:
    """accelerate 1.15 shards over accelerators only: asked to shard over CPUs it goes on with DDP, without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, parse_flag_from_env

    state = PartialState()
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        # Looked at once, by the accelerator about to be made, which puts FSDP in its place; the device stays the CPU.
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
