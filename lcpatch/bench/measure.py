"""How a benchmark measures: device time, the machine's two ceilings, and a record of where it ran."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
"""Version of the JSON that `write` makes."""
SAME = ("format", "gpu", "torch", "triton", "transformers", "lcpatch", "geometry")
"""What two results share whose rows may stand in one table."""
WHAT = ("part", "task", "arm", "batch", "length")
"""The columns that say what a row measured; the others say what came out."""


def device_ms(run: Callable[[], Any], warmup_ms: float = 25, repeat_ms: float = 100) -> float:
    """Median device time of `run` in ms, the L2 cache flushed before each repetition."""
    from triton.testing import do_bench

    return do_bench(run, warmup=warmup_ms, rep=repeat_ms, return_mode="median")


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph: without the launch gaps of many small kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the caches that a graph cannot record filling
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def forward_backward_ms(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[float, float]:
    """Device time of `forward()` and of its backward alone, in ms; `inputs` require grad."""
    with torch.no_grad():
        forward_ms = device_ms(forward)
    out = forward()

    def backward() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return forward_ms, device_ms(backward)


def matmul_tflops(size: int = 8192) -> float:
    """Rate of a bf16 matrix product of random data: the ceiling of arithmetic-bound kernels."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / device_ms(lambda: a @ b) / 1e9


def copy_gb_per_s(num_bytes: int = 4 << 30) -> float:
    """Bandwidth of a device-to-device copy, bytes read plus bytes written: the ceiling of memory-bound kernels."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / device_ms(lambda: target.copy_(source)) / 1e6


def environment(commit: str | None = None) -> dict[str, Any]:
    """Where and with what this runs."""
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "transformers", "lcpatch")},
        "cuda": torch.version.cuda,
        "commit": commit or _commit(),
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


def with_earlier(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """`result` behind the rows of an earlier one, but for what it measured again; rows of another commit name it.

    Raises:
        ValueError: the earlier one was measured elsewhere, with other packages, or of another model.
    """
    for name in SAME:
        if name in result and earlier.get(name) != result[name]:
            raise ValueError(
                f"--append: the file has {name} {earlier.get(name)!r}, this run {result[name]!r}: rows of both would "
                "not compare; give another --out"
            )
    rows = result.get("rows", [])
    measured = {_what(row) for row in rows}
    kept = [row for row in earlier["rows"] if _what(row) not in measured]
    if earlier["commit"] != result["commit"]:
        kept = [{"commit": earlier["commit"], **row} for row in kept]
    return {**result, "rows": kept + rows}


def write(result: dict[str, Any], path: Path) -> None:
    """Write `result` as JSON, atomically: a run that dies leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _what(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in WHAT)


def _commit() -> str | None:
    """The checkout's commit, with "+changes" behind it where the tree differs; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
