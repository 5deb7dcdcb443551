"""A page as it lies outside of the device: keys and values in what a codec makes of them, as bytes in one piece."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels import RecordLayout

from .codec import Plain

KINDS = {
    torch.int8: "int8",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
ALIGNMENT = 8  # of a part and of the record: a part is read as it lies, whatever its type


class Record:
    """How pages become bytes, and bytes pages.

    Args:
        codec: how they are stored.
        page: tokens.
        like: an empty tensor [1, K, 0, D] as the keys are.
    """

    def __init__(self, codec: Plain, page: int, like: Tensor) -> None:
        self.codec, self.like = codec, like
        example = codec.encode(like.new_zeros(1, 2, page, like.shape[3]))
        self.parts = {name: (x.dtype, x.shape[1:], x.numel() * x.element_size()) for name, x in example.items()}
        self.nbytes = sum(_aligned(size) for _, _, size in self.parts.values())
        self.layout = self._layout()

    def pack(self, pages: Tensor) -> Tensor:
        """[n, 2, page, D], keys and values -> uint8 [n, bytes]."""
        encoded = self.codec.encode(pages)
        parts = [encoded[name].contiguous().flatten(1).view(torch.uint8) for name in self.parts]
        return torch.cat([pad(x, (0, _aligned(x.shape[1]) - x.shape[1])) for x in parts], 1)

    def unpack(self, records: Tensor) -> Tensor:
        """The inverse, in the dtype of the keys."""
        parts, start = {}, 0
        for name, (dtype, shape, size) in self.parts.items():
            parts[name] = records[:, start : start + size].view(dtype).unflatten(1, shape)
            start += _aligned(size)
        return self.codec.decode(parts, self.like)

    def _layout(self) -> RecordLayout:
        """The same as `bring_pages` reads it: elements, then scales, then offsets."""
        dtype, shape, size = self.parts[""]
        kind = KINDS.get(dtype) or ("int4" if "_low" in self.parts else "fp8")
        if "_scale" not in self.parts:
            return RecordLayout(kind, self.nbytes)
        scales = _aligned(size)
        lows = scales + _aligned(self.parts["_scale"][2])
        group = shape.numel() * (2 if kind == "int4" else 1) * 4 // self.parts["_scale"][2]
        return RecordLayout(kind, self.nbytes, scales, lows if kind == "int4" else 0, group)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
