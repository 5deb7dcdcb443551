"""Why a file could not be written, whichever layer says so: only Python itself calls a full disk an OSError."""

from __future__ import annotations

import shutil
from pathlib import Path

ELSEWHERE = ("(os error ", "PytorchStreamWriter", "inline_container.cc", "iostream error")
"""What Rust (safetensors, tokenizers: a bare Exception) and torch.save (a RuntimeError) say of a write that failed."""


def why_unwritten(error: Exception, folder: Path) -> str | None:
    """The reason, and the room that is left in `folder`; None for an error that is not about a file."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError):
        reason = error.strerror or reason
    elif not any(words in reason for words in ELSEWHERE):
        return None
    elif error.__context__ is not None:  # torch's writer fails again as it closes, and says less then
        reason = f"{error.__context__}, {reason}"
    return f"{reason}; {shutil.disk_usage(folder).free / 2**20:.1f} MiB are free in {folder}"
