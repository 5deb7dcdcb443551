"""How a command, or a recipe, speaks to who runs it: errors and warnings in a line each."""

from __future__ import annotations

import sys
from typing import Any

from .errors import LcpatchError

USER_ERRORS = (LcpatchError, ValueError, OSError, ImportError)
"""What is told in one sentence: a wrong value, a missing file, no network, a package that is not installed."""


def sentence(error: Exception) -> str:
    """An error in one line; of a file, without the system's number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """As `warnings.showwarning`, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)
