"""Save, load and publish patched models, with cards."""

from .load import from_pretrained
from .preview import preview_card
from .push import push_to_hub
from .save import save_pretrained
from .upload import Push

__all__ = ["Push", "from_pretrained", "preview_card", "push_to_hub", "save_pretrained"]
