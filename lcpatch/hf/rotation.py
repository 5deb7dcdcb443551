"""Turning rotated keys on by some positions, with the model's own rotary embedding, whatever its layout.

A key rotated at position p and turned by d is the key rotated at p + d, where the embedding is one rotation per
position. That is asked of the model's code when a rotation is made, not assumed. Angles are the model's, in fp32: at
position 1,000,000 the fastest pair is off by up to 0.03 rad, in the model itself as here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModelError
from .layers import head_dim_of
from .models import weights_of

FIXED = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length; those of "dynamic" and "longrope" do."""

Rotation = Callable[[Tensor, Tensor], Tensor]


def rotation_of(base: nn.Module, module: nn.Module, owner: str) -> Rotation:
    """How to turn the keys [B, K, T, D] of attention `module` on by [B] positions; computes in fp32.

    Raises:
        UnsupportedModelError: no rotary embedding, one that depends on the length, or one that is not a rotation.
    """
    if not getattr(module, "use_rope", True):  # a layer without positions, of a model that has them in others
        return lambda keys, positions: keys
    kind = _kind(module)
    rotary = getattr(module, "rotary_emb", None) or next(
        (m for m in base.modules() if "RotaryEmbedding" in type(m).__name__), None
    )
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    instead = "use positions='absolute'"
    if rotary is None or apply is None:
        raise UnsupportedModelError(f"{owner}: {module.config.model_type} has no rotary embedding to turn; {instead}")
    if kind not in FIXED:
        raise UnsupportedModelError(
            f"{owner}: RoPE of type {kind!r} changes with the length, so keys cannot be turned on; {instead}"
        )
    if next(weights_of(rotary)).is_meta:
        raise UnsupportedModelError(
            f"{owner}: a model on the meta device has no frequencies to turn keys by; load its weights first"
        )
    extra = _layer_type(rotary, module)

    def turn(keys: Tensor, positions: Tensor) -> Tensor:
        wide = keys.float()
        cos, sin = rotary(wide, positions[:, None], **extra)
        plain = rotary(wide, torch.zeros_like(positions)[:, None], **extra)[0]  # at 0 it is the attention factor alone
        return (apply(wide, wide, cos, sin)[0] / plain[..., :1, None].transpose(1, 2)).to(keys.dtype)

    if not _is_rotation(turn, rotary, module):
        raise UnsupportedModelError(
            f"{owner}: {module.config.model_type}'s rotary embedding is not one rotation per position; {instead}"
        )
    return turn


def _kind(module: nn.Module) -> str:
    parameters: Any = getattr(module.config, "rope_parameters", None) or {}
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[module.layer_idx] in parameters:
        parameters = parameters[types[module.layer_idx]]
    return parameters.get("rope_type", "default")


def _layer_type(rotary: nn.Module, module: nn.Module) -> dict[str, Any]:
    """Models with several rotary embeddings in one module choose by the layer's type."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return {}
    return {"layer_type": module.config.layer_types[module.layer_idx]}


@torch.no_grad()
def _is_rotation(turn: Rotation, rotary: nn.Module, module: nn.Module) -> bool:
    """Whether turning by 7 and then by 11 is turning by 18, and changes something."""
    device = next(weights_of(rotary)).device
    x = torch.linspace(-2, 2, head_dim_of(module), device=device).view(1, 1, 1, -1)
    seven, eleven, both = (turn(x, torch.tensor([n], device=device)) for n in (7, 11, 18))
    twice = turn(seven, torch.tensor([11], device=device))
    close = (twice - both).abs().max() <= 64 * torch.finfo(torch.float32).eps * x.abs().max()
    return bool(close) and not torch.equal(seven, eleven)
