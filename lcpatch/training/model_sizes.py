"""What of a model's config the cost of a training step follows from: its sizes, and what its attention leaves out.

Of experts a token's time is that of those it is routed to, while all of them are weights. A layer with a window of its
own takes the window's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedModelError
from ..hf.layers import head_dim_of, num_kv_heads_of, shape_of
from ..hf.models import attention_modules, full_attention_layers
from ..hf.state import own_spec
from ..patching.resolve import pattern_of, sparse_layers
from . import arms, lora
from .step_cost import Sizes
from .support import KINDS


def on_meta(config: Any) -> nn.Module:
    """The model of a config in bf16, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def sizes_of(model: nn.Module, tune: str = "lora+") -> Sizes:
    """The sizes of a model `on_meta`, which is given what `tune` trains: it is used up.

    Raises:
        UnsupportedModelError: a model that `tune` or a patch does not take.
    """
    config, modules = model.config.get_text_config(), attention_modules(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    behind = {id(p) for m in (head, embeddings) for p in m.parameters()}
    linear = sum(_active(config, n, p) for n, p in model.named_parameters() if id(p) not in behind)
    shape = shape_of(config, 0, 1)
    keys = sum(head_dim_of(module) * num_kv_heads_of(config, layer) for layer, module in modules.items())
    intermediate = max(_active_in_mlp(config, model, module) for module in modules.values()) // (3 * config.hidden_size)
    with torch.device("meta"):
        trained = sum(p.numel() for p in lora.trainable(lora.prepare(model, tune)))
    return Sizes(
        weights=0 if tune == "full" else 2 * total,  # those that are trained are counted in fp32
        linear=linear,
        head=head.weight.numel(),
        trained=trained,
        layers=len(modules),
        depth=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate,
        attention=shape.num_heads * sum(map(head_dim_of, modules.values())) // len(modules),
        kv=2 * 2 * keys,
    )


def _active(config: Any, name: str, parameter: torch.Tensor) -> int:
    """How many of a parameter's numbers one token goes through: of experts [E, …], those that it is routed to."""
    if ".experts." not in name:
        return parameter.numel()
    routed = getattr(config, "num_experts_per_tok", None)
    if routed is None:
        raise UnsupportedModelError(f"{config.model_type}: its config has no num_experts_per_tok, which a plan needs")
    return parameter.numel() // len(parameter) * routed


def _active_in_mlp(config: Any, model: nn.Module, attention: nn.Module) -> int:
    """The same of the matrices beside `attention` in its layer."""
    layer = next(m for m in model.modules() if attention in m.children())
    own = {id(p) for p in attention.parameters()}
    return sum(_active(config, n, p) for n, p in layer.named_parameters() if p.dim() > 1 and id(p) not in own)


def density(config: Any, attention: str, options: Mapping[str, Any], layers: Any, length: int) -> float:
    """Pairs that an arm attends to over the causal ones, mean over the layers that attend; a window counts as well."""
    patch = arms.patch_for(attention, dict(options), layers)
    every = attending(config)
    full = full_attention_layers(config, every)
    shares = dict.fromkeys(every, own_spec(1, window_of(config)).density(length)) | dict.fromkeys(full, 1.0)
    if patch.mode != "never":
        chosen, pattern = sparse_layers(patch.layers, config, every), pattern_of(patch)
        for rank, layer in enumerate(chosen):
            shares[layer] = pattern.spec(shape_of(config, rank, len(chosen), layer)).density(length)
    return sum(shares.values()) / len(shares)


def attending(config: Any) -> list[int]:
    """The layers with attention; in some models others carry a state."""
    kinds = getattr(config, "layer_types", None) or [KINDS[0]] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind in KINDS]


def window_of(config: Any) -> int | None:
    """The tokens that those layers attend within that do not attend to their whole past; None: there are none."""
    every = attending(config)
    if len(full_attention_layers(config, every)) == len(every):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
