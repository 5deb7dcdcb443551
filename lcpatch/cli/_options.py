"""Options of a method on the command line: what a verb cannot know before the registry is loaded."""

from __future__ import annotations

from typing import Any

from ..core.options import HINT, parse_options

__all__ = ["HINT", "describe", "parse_options"]


def describe(options: dict[str, Any]) -> str:
    """Options as they would be written in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
