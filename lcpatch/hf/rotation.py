"""Turning rotated keys on by some positions, with the model's own rotary embedding, whatever its layout.

A key rotated at position p and turned by d is the key rotated at p + d, where the embedding is one rotation per
position. Whether a layer's is, and whether it has one at all, is asked of the model when a rotation is made, not
assumed: which layers do without positions is written in as many ways as there are models. Angles are the model's, in
fp32: at position 1,000,000 the fastest pair is off by up to 0.03 rad, in the model itself as here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..core.errors import UnsupportedModelError
from .head import decoder_of
from .models import attention_modules, evaluating, weights_of

FIXED = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length; those of "dynamic" and "longrope" do."""

INSTEAD = "use positions='absolute'"

ASKED = (0, 7, 18)
"""Positions of one token at which a model is asked for its keys."""

Rotation = Callable[[Tensor, Tensor], Tensor]


def rotations_of(base: nn.Module, modules: dict[int, nn.Module], owner: str) -> dict[int, Rotation]:
    """How to turn the keys [B, K, T, D] of each of the attention `modules` on by [B] positions; computes in fp32.

    Runs the model once, over one token.

    Raises:
        UnsupportedModelError: no rotary embedding, one that depends on the length, or one that is not a rotation.
    """
    rotaries = {index: _rotary(base, module) for index, module in modules.items()}
    if any(rotary is not None and next(weights_of(rotary)).is_meta for rotary in rotaries.values()):
        raise UnsupportedModelError(
            f"{owner}: a model on the meta device has no frequencies to turn keys by; load its weights first"
        )
    asked = _keys(base, owner)
    return {index: _rotation(module, rotaries[index], asked[index], owner) for index, module in modules.items()}


def _rotary(base: nn.Module, module: nn.Module) -> nn.Module | None:
    return getattr(module, "rotary_emb", None) or next(
        (m for m in base.modules() if "RotaryEmbedding" in type(m).__name__), None
    )


def _rotation(module: nn.Module, rotary: nn.Module | None, asked: Tensor, owner: str) -> Rotation:
    """Of one layer, whose keys [3, K, 1, D] of one token at the positions `ASKED` are `asked`."""
    zero, seven, eighteen = asked.unsqueeze(1)
    if _same(zero, seven):
        return lambda keys, positions: keys  # a layer without positions, of a model that has them in others
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise UnsupportedModelError(f"{owner}: {module.config.model_type} has no rotary embedding to turn; {INSTEAD}")
    if (kind := _kind(module)) not in FIXED:
        raise UnsupportedModelError(
            f"{owner}: RoPE of type {kind!r} changes with the length, so keys cannot be turned on; {INSTEAD}"
        )
    extra = _layer_type(rotary, module)
    part = getattr(module, "rotary_ndims", None)  # some models turn the first numbers of a head and leave the others

    def turn(keys: Tensor, positions: Tensor) -> Tensor:
        wide = keys[..., :part].float()
        # Where a device map spreads layers, one rotary embedding answers all of them, from where it lies.
        cos, sin = (x.to(keys.device) for x in rotary(wide, positions[:, None], **extra))
        # At 0 it is the attention factor alone.
        plain = rotary(wide, torch.zeros_like(positions)[:, None], **extra)[0].to(keys.device)
        turned = apply(wide, wide, cos, sin)[0] / plain[..., :1, None].transpose(1, 2)
        return torch.cat([turned.to(keys.dtype), keys[..., turned.shape[3] :]], 3)

    def on(keys: Tensor, by: int) -> Tensor:
        return turn(keys, torch.tensor([by], device=keys.device))

    if not (_same(on(zero, 7), seven) and _same(on(seven, 11), eighteen)):
        raise UnsupportedModelError(
            f"{owner}: {module.config.model_type}'s rotary embedding is not one rotation per position; {INSTEAD}"
        )
    return turn


@torch.no_grad()
def _keys(base: nn.Module, owner: str) -> dict[int, Tensor]:
    """Each layer's keys [3, K, 1, D] of one token at the positions `ASKED`, and of one hidden state.

    Raises:
        UnsupportedModelError: hidden states hold positions already.
    """
    embedding = base.get_input_embeddings()
    device = next(x.device for x in weights_of(base) if not x.is_meta)  # others are offloaded
    noise = torch.randn(1, 1, embedding.embedding_dim, generator=torch.Generator().manual_seed(0))
    cache, modules = DynamicCache(config=base.config), list(attention_modules(base).values())

    def alike(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = hidden[:1].expand_as(hidden)
        if module is modules[0] and not _same(hidden, first):
            raise UnsupportedModelError(
                f"{owner}: {base.config.model_type} has no rotary embedding to turn, it adds positions to its tokens; "
                f"{INSTEAD}"
            )
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    hooks = [module.register_forward_pre_hook(alike, with_kwargs=True) for module in modules]
    try:
        with evaluating(base):  # dropout would tell them apart too
            decoder_of(base)(
                inputs_embeds=noise.to(device, base.dtype).repeat(len(ASKED), 1, 1),  # ctrl scales them in place
                position_ids=torch.tensor(ASKED, device=device)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return {module.layer_idx: cache.layers[module.layer_idx].keys for module in modules}


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether they are equal but for rounding, at best that of fp32."""
    eps = max(torch.finfo(kind).eps for kind in (x.dtype, y.dtype, torch.float32))
    return bool((x.float() - y.float()).norm() <= 16 * eps * y.float().norm())


def _kind(module: nn.Module) -> str:
    parameters: Any = getattr(module.config, "rope_parameters", None) or {}
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[module.layer_idx] in parameters:
        parameters = parameters[types[module.layer_idx]] or {}
    return parameters.get("rope_type", "default")


def _layer_type(rotary: nn.Module, module: nn.Module) -> dict[str, Any]:
    """Models with several rotary embeddings in one module choose by the layer's type."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return {}
    return {"layer_type": module.config.layer_types[module.layer_idx]}
