"""A page as it lies outside of the device: keys and values in what a codec makes of them, as bytes in one piece."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpatch_kernels.resident_pages import KINDS, RecordLayout

from .codec import Float8, Plain

ALIGNMENT = 8  # of a part and of the record: a part is read as it lies, whatever its type


class Record:
    """How pages become bytes, and bytes pages.

    Args:
        codec: how they are stored.
        page: tokens.
        like: an empty tensor [1, K, 0, D] as the keys are.
    """

    def __init__(self, codec: Plain, page: int, like: Tensor) -> None:
        self.codec, self.page, self.like = codec, page, like
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
        dtype, _, size = self.parts[""]
        dtype = torch.float8_e4m3fn if isinstance(self.codec, Float8) else dtype  # which it holds as bytes
        plain = RecordLayout(next(kind for kind, of in KINDS.items() if of == dtype), self.nbytes)
        if "_scale" not in self.parts:
            return plain
        elements, num_scales = 8 * size // plain.bits, self.parts["_scale"][2] // 4
        scales = _aligned(size)
        lows = scales + _aligned(4 * num_scales) if "_low" in self.parts else 0
        return plain._replace(scales=scales, lows=lows, group=elements // num_scales)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
