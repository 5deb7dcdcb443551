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


def check_dense(name: str) -> str:
    """`name`, if a layer can run it where it stays dense.

    Raises:
        ValueError: no such attention implementation, or our own.
    """
    from transformers import AttentionInterface

    known = sorted({"eager", *AttentionInterface().valid_keys()} - {NAME})
    if name not in known and "/" not in name:  # "org/kernel" is looked up on the Hub
        raise ValueError(f"dense={name!r} is not one of transformers' implementations: {', '.join(known)}")
    return name
