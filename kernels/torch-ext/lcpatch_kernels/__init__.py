"""Attention kernels for long context: block-sparse patterns described by a few integers per query head, and decoding.

Needs torch, and triton where a kernel runs; imports nothing of lcpatch.
"""

from .attn_mass import attn_mass
from .block_sparse import DENSE, UNBOUNDED, BlockSparseSpec, Rule, block_sparse, block_sparse_gradients
from .sparse_decode import sparse_decode

__all__ = [
    "DENSE",
    "UNBOUNDED",
    "BlockSparseSpec",
    "Rule",
    "attn_mass",
    "block_sparse",
    "block_sparse_gradients",
    "sparse_decode",
]
