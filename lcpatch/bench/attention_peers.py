"""Peers of `lcpatch bench attention`: torch's dense kernels, groups folded into a batch of them, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lcpatch_kernels.block_sparse import dense as dense_oracle

from ..patterns.s2 import S2
from .attention_cases import Shape


def backend(kind: SDPBackend, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Dense causal attention by one of torch's kernels."""
    q, k, v = inputs

    def forward() -> Tensor:
        with sdpa_kernel(kind):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    return forward


def grouped_cudnn(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    """Shifted groups by what torch has: both halves of the heads folded into a batch of dense causal groups.

    Rolls as LongLoRA's reshaping branch does: one dense call costs the same whether or not its wrapped group is cut.
    """
    half, kv_half = q.shape[1] // 2, k.shape[1] // 2

    def fold(x: Tensor, plain: int) -> Tensor:
        x = torch.cat([x[:, :plain], x[:, plain:].roll(-(group // 2), 2)], 1)
        return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = sdpa(fold(q, half), fold(k, kv_half), fold(v, kv_half), is_causal=True, enable_gqa=True)
    out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([out[:, :half], out[:, half:].roll(group // 2, 2)], 1)


def flex(pattern: S2, shape: Shape, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """FlexAttention with S2's rule in closed form, so that it is not slowed by the generality of our `mask_mod`."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs
    torch._dynamo.reset()  # past 8 patterns and lengths dynamo would fall back to eager, which holds all scores
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = flex_block_mask(pattern, shape, q.shape[2], q.device)
    return partial(compiled, q, k, v, block_mask=block_mask, enable_gqa=True)


def flex_block_mask(pattern: S2, shape: Shape, length: int, device: torch.device) -> Any:
    """FlexAttention's `BlockMask` of S2 without sinks, from the pattern's blocks.

    `create_block_mask` would ask all H T T pairs, compiled anew for every pattern and length; asking each pair of
    64-token blocks gives the same tables (a test compares them) in 134 MB at 128K.
    """
    block, local, stride = pattern.block_size, pattern.local_blocks, pattern.stride
    group, tile = shape.num_heads // shape.num_kv_heads, dense_oracle.TILE

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = (j // block + h // group) % stride == 0
        return (j <= i) & ((i // block - j // block < local) | far)

    unit = min(block, tile)
    starts = torch.arange(0, -(-length // tile) * tile, unit, device=device)
    head = torch.arange(shape.num_heads, device=device)[:, None, None]
    seen = keep(head, head, starts[:, None] + unit - 1, starts)  # a unit pair's last row: whether any pair is kept
    whole = keep(head, head, starts[:, None], starts + unit - 1)  # its first row and last key: whether all are
    per = tile // unit
    seen, whole = (x.unflatten(2, (-1, per)).unflatten(1, (-1, per)) for x in (seen, whole))
    seen, whole = seen.any(4).any(2), whole.all(4).all(2)
    return dense_oracle.from_tiles(seen[None], whole[None], keep, (length, length))
