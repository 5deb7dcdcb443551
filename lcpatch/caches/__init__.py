"""What is kept of the past: caches for `generate(past_key_values=…)`. One file a method."""

from .cache import LongCache, caches
from .growing import GrowingLayer

__all__ = ["GrowingLayer", "LongCache", "caches"]
