"""Words of a command line: numbers, and a method's options, which a verb cannot know before the registry is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from ..core.options import HINT, parse_options

__all__ = ["HINT", "count", "counts", "describe", "is_count", "parse_options"]


def describe(options: dict[str, Any]) -> str:
    """Options as they would be written in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def is_count(text: str) -> bool:
    """Whether it is a whole number above 0."""
    return text.isascii() and text.isdigit() and int(text) > 0


def count(text: str) -> int:
    """A number of tokens, heads or the like, as a type of argparse."""
    if not is_count(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Several of them, between commas."""
    return tuple(count(part.strip()) for part in text.split(","))
