"""Text of unknown origin in a card: as Markdown that shows it, in code, in the metadata. It can never be markup."""

from __future__ import annotations

import json
import re

PUNCTUATION = re.compile(r"([\\`*_\[\]<>&|~#$])")
STARTS = re.compile(r"^(?:([-+=])|(\d{1,9})([.)])(?=\s|$))")
"""What would make a list or a heading's underline of a line's start."""


class Ready(str):
    """Markdown that is meant as it is: the template engine escapes every value that is not one."""

    __slots__ = ()


def clean(value: object) -> str:
    """`value` on one line, without control characters and others that do not print (marks of direction among them)."""
    shown = "".join(c for c in str(value) if c.isprintable() or c.isspace())
    return " ".join(shown.split())


def markdown(value: object) -> Ready:
    """`value` as text, also in a table."""
    if isinstance(value, Ready):
        return value
    line = PUNCTUATION.sub(r"\\\1", clean(value))
    return Ready(STARTS.sub(lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", line))


def code(value: object) -> Ready:
    """`value` as code within a line, also in a table."""
    line = clean(value).replace("|", "\\|")
    if not line:
        return Ready("")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return Ready(f"{fence}{pad}{line}{pad}{fence}")


def block(value: object, language: str = "") -> Ready:
    """`value` as a block of code, its lines kept."""
    lines = [clean_line(line) for line in str(value).splitlines()]
    body = "\n".join(lines).strip("\n")
    fence = "`" * max(3, _longest_run(body) + 1)
    return Ready(f"{fence}{language}\n{body}\n{fence}")


def argument(name: str, value: str | None) -> Ready:
    """A further argument of a call in a card's code: a string literal, whatever it says; nothing for None."""
    return Ready("" if value is None else f", {name}={json.dumps(clean(value), ensure_ascii=False)}")


def clean_line(line: str) -> str:
    """A line of code: its indentation stays, what does not print goes."""
    return "".join(c for c in line.expandtabs(4).rstrip() if c.isprintable())


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
