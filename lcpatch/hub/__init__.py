"""Save, load and publish patched models."""

from .load import from_pretrained
from .push import Push, push_to_hub
from .save import save_pretrained

__all__ = ["Push", "from_pretrained", "push_to_hub", "save_pretrained"]
