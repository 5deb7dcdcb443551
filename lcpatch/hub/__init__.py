"""Save, load and publish patched models, adapters, caches and kernels, with cards."""

from .cache import load_cache
from .generate import export_generate, push_generate
from .kernels import export_kernels, push_kernels
from .load import from_pretrained
from .preview import preview_card
from .push import push_to_hub
from .save import save_pretrained
from .scorer import load_scorer
from .upload import Push

__all__ = [
    "Push",
    "export_generate",
    "export_kernels",
    "from_pretrained",
    "load_cache",
    "load_scorer",
    "preview_card",
    "push_generate",
    "push_kernels",
    "push_to_hub",
    "save_pretrained",
]
