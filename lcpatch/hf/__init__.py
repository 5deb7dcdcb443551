"""The only room that touches transformers' registries: one attention function, one mask function, per-module state."""

from .registration import NAME, register
from .state import LayerState

__all__ = ["NAME", "LayerState", "register"]
