"""The model that is trained: loaded with the positions it needs, patched, and with what is trained made trainable."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hf.demo_model import demo_model
from ..hf.models import unwrap
from ..patching import apply
from . import arms, lora, rope
from .config import TrainConfig
from .support import KINDS

STATELESS = ("mlp", "moe")
"""Kinds of layers through which a token sees no other."""


def resolve(name: str) -> str:
    """The folder or Hub id that `name` means.

    Raises:
        FileNotFoundError: a path without a folder, or the demo's model out of reach.
    """
    if name == "demo":
        return str(demo_model())
    path = Path(name).expanduser()
    if not path.is_dir() and not name.startswith((".", "/", "~")):
        return name
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{name} holds an adapter: name a model with it merged, as --merged writes one")
        raise FileNotFoundError(f"{name} is no folder with a model in it: it has no config.json")
    return str(path)


def load_tokenizer(config: TrainConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    name = resolve(config.model)
    try:
        return AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        raise ValueError(f"{name}: its tokenizer cannot be loaded; save one in the model's folder ({error})") from error


def why_documents_meet(config: TrainConfig) -> str | None:
    """Why documents in one row would see each other in this model, whatever its attention does; None: they do not."""
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(resolve(config.model)).get_text_config()
    kinds = set(getattr(model, "layer_types", None) or ()) - {*KINDS, *STATELESS}
    if not kinds:
        return None
    return f"{model.model_type}: layers of kind {', '.join(sorted(kinds))} carry a state from one document to the next"


def load_model(config: TrainConfig) -> nn.Module:
    """The model of `config`, ready to train.

    Raises:
        ImportError: a package that a setting needs.
        UnsupportedModelError, ValueError: a model that a setting does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = resolve(config.model)
    patch = arms.patch_for(config.attention, config.options, config.layers, config.sinks)
    settings: dict[str, Any] = {"config": AutoConfig.from_pretrained(name), "dtype": dtype_of(config)}
    if config.rope != "none":
        settings["config"] = rope.extend(settings["config"], config.length, config.rope)
    if config.dense:
        settings["attn_implementation"] = config.dense
    if config.quantize == "4bit":
        settings["quantization_config"] = _four_bits(settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(name, **settings)
    model = lora.prepare(model, config.tune, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout)
    return apply(model, patch)


def dtype_of(config: TrainConfig) -> torch.dtype:
    """Of the frozen weights."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.dtype)


def checkpointing_settings(kind: str) -> dict[str, Any]:
    """transformers' training arguments for "full", "selective" or "none".

    Selective recomputation is torch's own: all is computed again but attention, whose results are kept. Attention takes
    most of a long forward, and its results are a small part of what a layer holds.
    """
    from transformers import TrainingArguments

    new = hasattr(TrainingArguments, "activation_checkpointing")  # from 5.23 on, which warns of the old name
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if kind == "none":
        return {name: False}
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return {name: True, f"{name}_kwargs": settings}


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = getattr(op, "__name__", str(op))
    attends = "flash_attn" in name or "scaled_dot_product" in name or "flash_attention" in name
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE


def enable_inputs(model: nn.Module) -> Any:
    """Let gradients reach the first checkpointed layer of a model whose embeddings are frozen; returns the hook."""
    embeddings = unwrap(model).get_input_embeddings()
    return embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))


def _four_bits(dtype: torch.dtype) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("quantize='4bit' needs bitsandbytes: pip install bitsandbytes, or leave quantize out")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
