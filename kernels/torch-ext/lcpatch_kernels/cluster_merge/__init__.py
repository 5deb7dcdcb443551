"""`cluster_merge`: one pass of chunked soft matching, which merges similar keys of a cache into weighted centroids."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._check import check_tensor
from .._impl import Impl, choose
from .._ops import add_op_namespace_prefix

__all__ = ["MergeImpl", "cluster_merge", "num_merged"]

MergeImpl = Impl
TRITON_MAX_CHUNK = 256  # a program holds the chunk's chunk / 2 x chunk / 2 similarities in registers
TRITON_MAX_BYTES = 64 << 10  # and its keys in shared memory, of which sm_86 has 99 KiB


def cluster_merge(
    k: Tensor,
    v: Tensor,
    size: Tensor,
    *,
    chunk: int = 128,
    merges: int | None = None,
    weighted: bool = True,
    impl: MergeImpl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the most similar keys of every chunk, and their values. Inference only.

    The slots of a chunk take turns: a, b, a, b, … Every a finds the b whose key has the largest cosine with its own
    (the first of equals), the best of these edges are kept (several a may share a b), and an a joins its b:
    k = sum n_i k_i / sum n_i, v likewise, n = sum n_i, at b's place. Every chunk gives up the same number of slots, in
    every row and head: pads (n = 0) go first, the first pads before others, then a's by the similarity of their edge.
    A pad never matches. What is left stays in order.

    Args:
        k, v: [B, K, S, D], any strides with a contiguous last dimension; fp32, fp16, bf16 (float64: reference only).
        size: fp32 [B, K, S], n: how many tokens a slot stands for; 0: a pad.
        chunk: slots in a chunk, even; the last chunk may be shorter. Triton: at most 256, and 64 KiB of keys.
        merges: slots that a chunk gives up, 0 … chunk // 2 (a shorter last chunk: its share, rounded down); None:
            chunk // 2, the most that one pass can.
        weighted: False takes the plain mean of a cluster's slots instead (an ablation: forgets the sizes in k and v).
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        `(k, v, size, target)`: [B, K, S', D] twice and fp32 [B, K, S'], where S' = S - num_merged(S, chunk, merges),
        and int32 [B, K, S]: the slot that each old slot went to, -1 for a pad that is gone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.

    Source: Chelsea / CentroidKV, arXiv 2506.11418: chunked soft matching with an alternating partition. Ours: sizes as
    weights (the paper does not say how repeated passes weigh), and pads.
    """
    merges = chunk // 2 if merges is None else merges
    _check(k, v, size, chunk, merges)
    most = _largest_chunk(k)
    problem = None if chunk <= most else f"chunks of {chunk} where at most {most} fit"
    return _merge(k, v, size, chunk, merges, weighted, choose(impl, k, problem))


def num_merged(size: int, chunk: int, merges: int) -> int:
    """How many of `size` slots a pass with these options gives up."""
    return size // chunk * merges + size % chunk * merges // chunk


def _largest_chunk(k: Tensor) -> int:
    """The most slots of a chunk that the kernel can match."""
    block_d = 1 << max(k.shape[-1] - 1, 15).bit_length()
    return min(TRITON_MAX_CHUNK, TRITON_MAX_BYTES // (block_d * k.element_size()))


def _check(k: Tensor, v: Tensor, size: Tensor, chunk: int, merges: int) -> None:
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.is_floating_point():
        raise ValueError(
            f"k and v [B, K, S, D] of one floating dtype are wanted; got {list(k.shape)} {k.dtype}, {list(v.shape)} "
            f"{v.dtype}"
        )
    check_tensor("v", v, k.shape, k.dtype, k.device)
    check_tensor("size", size, k.shape[:3], torch.float32, k.device)
    if chunk < 2 or chunk % 2:
        raise ValueError(f"chunk={chunk} must be even and at least 2: its slots take turns as a and b")
    if not 0 <= merges <= chunk // 2:
        raise ValueError(
            f"merges={merges} must lie in 0 … {chunk // 2} for chunks of {chunk}: only every second slot can join "
            "another; merge again for more"
        )


@torch.library.custom_op(add_op_namespace_prefix("cluster_merge"), mutates_args=())
def _merge(
    k: Tensor, v: Tensor, size: Tensor, chunk: int, merges: int, weighted: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _module(impl)
    target = module.match(k, size, chunk, merges)
    num_out = k.shape[2] - num_merged(k.shape[2], chunk, merges)
    return *module.merge(k, v, size, target, num_out, chunk, merges, weighted), target


@_merge.register_fake
def _(k, v, size, chunk, merges, weighted, impl):
    num_out = k.shape[2] - num_merged(k.shape[2], chunk, merges)
    shape = (*k.shape[:2], num_out, k.shape[3])
    out = (k.new_empty(shape), v.new_empty(shape), size.new_empty(shape[:3]))
    return *out, torch.empty(k.shape[:3], dtype=torch.int32, device=k.device)


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        from . import reference

        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
