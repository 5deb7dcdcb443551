"""Options that are on or off. Of any text an `if` makes True, "false" included."""

from __future__ import annotations


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
