"""Files that are whole or absent, and why one could not be written, whichever layer says so."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ELSEWHERE = ("(os error ", "PytorchStreamWriter", "inline_container.cc", "iostream error")
"""What Rust (safetensors, tokenizers: a bare Exception) and torch.save (a RuntimeError) say of a write that failed.

Only Python itself calls a full disk an OSError.
"""


def why_unwritten(error: Exception, folder: Path) -> str | None:
    """The reason, and the room that is left in `folder`; None for an error that is not about a file."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError):
        reason = error.strerror or reason
    elif not any(words in reason for words in ELSEWHERE):
        return None
    elif error.__context__ is not None:  # torch's writer fails again as it closes, and says less then
        reason = f"{error.__context__}, {reason}"
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return f"{reason}; {shutil.disk_usage(there).free / 2**20:.1f} MiB are free in {there}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place in one step when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode  # of any new file: safetensors' own is for no one else to read
    try:
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # a rename must not reach the disk before what it names
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
