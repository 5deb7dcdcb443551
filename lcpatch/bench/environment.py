"""Where a benchmark runs: what its result records of the machine, the packages and the checkout."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BenchmarkError

FORMAT = 1
"""Version of the JSON that a result is written as."""
RESULTS = "kernels/results"
"""Where a checkout keeps them."""


def environment(commit: str | None = None) -> dict[str, Any]:
    """Where and with what this runs."""
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "transformers", "lcpatch")},
        "cuda": torch.version.cuda,
        "commit": commit or commit_of(Path(__file__).parent),
    }


def installed(name: str) -> str | None:
    """The version of a package; None where there is none."""
    if name == "lcpatch":
        from lcpatch import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def need_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        BenchmarkError: there is none.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError("this benchmark needs a CUDA GPU; torch.cuda.is_available() is False")


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that `folder` lies in; None outside of one.

    With "+changes" behind it where the tree differs, but for results: one benchmark's do not change the next's code.
    """
    git, changes = ["git", "-C", str(folder)], ["status", "--porcelain", "--", ":/", f":(top,exclude){RESULTS}"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, *changes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
