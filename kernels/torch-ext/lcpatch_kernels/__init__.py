"""Attention kernels for long context: block-sparse patterns described by a few integers per query head, and decoding.

Needs torch, and triton where a kernel runs; imports nothing of lcpatch.
"""

from .attn_mass import attn_mass
from .block_sparse import DENSE, UNBOUNDED, BlockSparseSpec, Rule, block_sparse, block_sparse_backward
from .cluster_merge import cluster_merge
from .page_scores import page_bounds, page_scores
from .resident_pages import RecordLayout, bring_pages, take_slots
from .sparse_decode import sparse_decode
from .transformers_attention import flash_attn_forward, supports_flash_attn

__all__ = [
    "DENSE",
    "UNBOUNDED",
    "BlockSparseSpec",
    "RecordLayout",
    "Rule",
    "attn_mass",
    "block_sparse",
    "block_sparse_backward",
    "bring_pages",
    "cluster_merge",
    "flash_attn_forward",
    "page_bounds",
    "page_scores",
    "sparse_decode",
    "supports_flash_attn",
    "take_slots",
]
