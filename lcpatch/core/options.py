"""Options as words of a command line: `--group-size 512 --wrap`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

HINT = "options of METHOD follow as `--name value`, such as `--stride 8`; `lcpatch methods METHOD` lists them"


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`--group-size 512 --wrap` as `{"group_size": 512, "wrap": True}`; a value is JSON, or else text.

    Raises:
        ValueError: a value without a name.
    """
    return {name.replace("-", "_"): _value(name, text) for name, text in _pairs(words)}


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r} belongs to no option; {HINT}")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield name, text


def _value(name: str, text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if name == "layers" and text.replace(",", "").isdigit():
        return [int(n) for n in text.split(",") if n]
    if "/" in text and text.replace("/", "", 1).isdigit():  # --group-ratio 1/8
        top, bottom = text.split("/")
        return int(top) / int(bottom) if int(bottom) else text
    if text.startswith("."):  # --budget .2, which JSON has not
        text = f"0{text}"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
