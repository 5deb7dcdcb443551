"""Our name in transformers' two registries."""

from __future__ import annotations

NAME = "lcpatch"
"""The attention implementation's name. transformers matches "sdpa", "flash", "flex", "paged|" and "/" inside names."""


def register() -> None:
    """Add our attention and mask functions to transformers' registries under `NAME`; idempotent, changes nothing else.

    Both are needed: with an attention function alone transformers passes no mask, and padding is ignored in silence.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from .attention import attention
    from .mask import mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
