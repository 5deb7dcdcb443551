"""Attention patterns: one file a method. A file holds the method's config, its paper, and its rule for every head.

A pattern knows no kernel and no model: it compiles itself to one `lcpatch_kernels.Rule` per query head.
"""

from .base import AttentionPattern, LayerShape, patterns

__all__ = ["AttentionPattern", "LayerShape", "patterns"]
