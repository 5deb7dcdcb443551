"""Save and load patched models."""

from .load import from_pretrained
from .save import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
