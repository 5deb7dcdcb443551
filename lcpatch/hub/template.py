"""The templates of the cards, rendered strictly: an undefined variable is an error, every value is escaped."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .escape import Ready, block, code, markdown

FOLDER = Path(__file__).parent / "hub_cards"


def render(template: str, /, **values: Any) -> str:
    """The card `template` ("model", "adapter", …).

    Raises:
        jinja2.UndefinedError: the template uses a variable that was not given.
    """
    text = _environment().get_template(f"{template}.md.jinja").render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def metadata(data: dict[str, Any]) -> Ready:
    """The YAML at a card's head; what is empty is left out."""
    import yaml

    given = {key: value for key, value in data.items() if value not in (None, "", [], ())}
    return Ready(yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10**6))


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        finalize=markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"code": code, "block": block, "raw": Ready, "url": lambda text: Ready(quote(text))}
    return environment
