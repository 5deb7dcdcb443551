"""Attention kernels for long context: block-sparse patterns described by a few integers per query head.

Needs torch, and triton where a kernel runs; imports nothing of lcpatch.
"""

from .block_sparse import DENSE, UNBOUNDED, BlockSparseSpec, Rule, block_sparse

__all__ = ["DENSE", "UNBOUNDED", "BlockSparseSpec", "Rule", "block_sparse"]
