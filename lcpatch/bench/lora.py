"""The training step that benchmarks time: LoRA on the attention's projections, recomputed in the backward."""

from __future__ import annotations

from torch import nn


def with_lora(model: nn.Module) -> nn.Module:
    """`model` with LoRA of rank 8 on the attention's projections, inside of PEFT's; in training mode, checkpointed."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    wrapped = get_peft_model(model, lora).train()
    model.enable_input_require_grads()
    checkpoint(model, True)
    return wrapped


def checkpoint(model: nn.Module, on: bool) -> None:
    """Keep a layer's input alone for its backward, or all that it computes."""
    new = hasattr(model, "activation_checkpointing_enable")  # from transformers 5.23 on, which warns of the old name
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()
