"""What is kept of the past: caches for `generate(past_key_values=…)`. One file a method."""

from .layer import GrowingLayer, LongCache, caches

__all__ = ["GrowingLayer", "LongCache", "caches"]
