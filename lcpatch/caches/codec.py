"""How a kept key or value is stored: as the model computes it, or in fewer bits with scales.

A codec turns [B, K, T, D] into tensors of the same first three dimensions and back. What is chosen to be kept (the
method) and where it lies (the tier) know nothing of it.

Errors per element, for a group with largest magnitude a, or with range r:

    bf16    a 2^-8              int8    a / 254             int4    r / 30
    fp8     a 2^-4              (e4m3: 3 bits behind the leading one, scaled so that the largest is 448)

each plus the rounding of the arithmetic itself, in the tensor's own dtype.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

GROUP = 32  # elements of int4 that share a scale and an offset: 5 bits an element in all


class Plain:
    """As the model computes it."""

    lossless: ClassVar[bool] = True
    in_kernel: ClassVar[bool] = True  # whether `sparse_decode` reads it as it lies

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of x [B, K, T, D], by a suffix to its name."""
        return {"": x}

    def decode(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        """Inverse of `encode`, in the dtype of `like`."""
        return parts[""].to(like.dtype)


class BFloat16(Plain):
    """bf16 whatever the model computes in."""

    lossless = in_kernel = False

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"": x.to(torch.bfloat16)}


class Int8(Plain):
    """Eight bits and one scale a token and KV head."""

    lossless = False
    largest: ClassVar[float] = 127.0

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        scale = _scale(x, self.largest)
        return {"": (x.float() / scale[..., None]).round().to(torch.int8), "_scale": scale}

    def decode(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        return (parts[""].float() * parts["_scale"][..., None]).to(like.dtype)


class Float8(Int8):
    """e4m3 and one scale a token and KV head; held as bytes, which every device can gather."""

    largest = torch.finfo(torch.float8_e4m3fn).max

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        scale = _scale(x, self.largest)
        return {"": (x.float() / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), "_scale": scale}

    def decode(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        return super().decode({**parts, "": parts[""].view(torch.float8_e4m3fn)}, like)


class Int4(Plain):
    """Four bits, two in a byte, with a scale and an offset for every 32 elements."""

    lossless = in_kernel = False

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] % 2:
            raise ValueError(f"codec='int4' packs two numbers in a byte; this head dim is {x.shape[-1]}: use 'int8'")
        groups = x.float().unflatten(-1, (-1, _group(x.shape[-1])))
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        code = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        return {"": code[..., 0::2] | (code[..., 1::2] << 4), "_scale": scale, "_low": low}

    def decode(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        packed = parts[""]
        code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        groups = code.float().unflatten(-1, (parts["_low"].shape[-1], -1))
        return (groups * parts["_scale"][..., None] + parts["_low"][..., None]).flatten(-2).to(like.dtype)


CODECS: dict[str | None, type[Plain]] = {None: Plain, "bf16": BFloat16, "int8": Int8, "int4": Int4, "fp8": Float8}


def codec_named(name: str | None) -> Plain:
    """The codec called `name`.

    Raises:
        ValueError: no such codec.
    """
    if not isinstance(name, (str, type(None))) or name not in CODECS:
        raise ValueError(f"codec={name!r} is not one of {', '.join(map(repr, CODECS))} (None: as the model computes)")
    return CODECS[name]()


def _scale(x: Tensor, largest: float) -> Tensor:
    """fp32 [B, K, T], with which the largest element of a token becomes `largest`; zeros stay zeros."""
    return (x.float().abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _group(head_dim: int) -> int:
    return GROUP if head_dim % GROUP == 0 else head_dim
