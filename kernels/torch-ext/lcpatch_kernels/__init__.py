"""Attention kernels for long context: block-sparse patterns described by a few integers per query head, and decoding.

Needs torch, and triton where a kernel runs; imports nothing of lcpatch.
"""

from .attn_mass import attn_mass
from .block_sparse import DENSE, UNBOUNDED, BlockSparseSpec, Rule, block_sparse
from .sparse_decode import sparse_decode
from .transformers_attention import flash_attn_forward, supports_flash_attn

__all__ = [
    "DENSE",
    "UNBOUNDED",
    "BlockSparseSpec",
    "Rule",
    "attn_mass",
    "block_sparse",
    "flash_attn_forward",
    "sparse_decode",
    "supports_flash_attn",
]
