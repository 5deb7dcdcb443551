"""In what two groups of settings differ, for a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first name under which they differ, within groups of settings too, and what each has there; None: nowhere."""
    for name in {**one, **other}:
        first, second = one.get(name), other.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            if inner := difference(first, second, f"{prefix}{name}."):
                return inner
        elif first != second:
            return prefix + name, first, second
    return None
