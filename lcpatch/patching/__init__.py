"""Patch a model, undo it, look at it."""

from .apply import apply, patched, remove
from .report import LayerReport, report

__all__ = ["LayerReport", "apply", "patched", "remove", "report"]
