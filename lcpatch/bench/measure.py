"""How a benchmark measures: device time, the machine's two ceilings; and how it says what could not run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def in_a_line(error: Exception) -> str:
    """An error of a peer's own, which is a part of the result, as its row says it."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" …")
