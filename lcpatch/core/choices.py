"""Names out of a fixed set, as a command or a call gives them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A question to go behind a sentence, with a space in front; empty where no choice is close."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def chosen(what: str, names: Iterable[str], choices: Collection[str]) -> list[str]:
    """`names`, each one of `choices` and there once.

    Args:
        what: who asks, for the message, such as "--part".
        names: what was given.
        choices: what there is.

    Raises:
        ValueError: none, an unknown one, or one that is there twice.
    """
    given = list(names)
    for place, name in enumerate(given):
        if name not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{what}: {name!r} is not one of {known}.{did_you_mean(name, choices)}")
        if name in given[:place]:
            raise ValueError(f"{what}: {name!r} is there twice")
    if not given:
        raise ValueError(f"{what} needs at least one of {', '.join(map(repr, choices))}")
    return given
