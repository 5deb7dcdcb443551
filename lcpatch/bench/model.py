"""`lcpatch bench model`: a whole model, patched and not: prefill, a LoRA training step, decoding; time and peak memory.

The model has the geometry of Llama-3.1-8B and random weights: speed does not depend on them. Each arm runs the same
weights: dense (transformers' SDPA), S2 in every second layer, S2 in all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..caches.held import bytes_held
from ..caches.s2 import S2Cache
from ..core.errors import BenchmarkError
from ..patching import patched
from ..patterns.s2 import S2
from .environment import environment, need_gpu
from .geometry import LLAMA_8B, random_llama
from .judge import between_backends
from .lora import checkpoint, with_lora

TASKS = ("prefill", "train", "decode")
ARMS = {"dense": None, "s2, every second layer": "every_2", "s2, all layers": lambda layer: True}
LOSS_TOKENS = 4096  # at most: logits of a whole 32K row would take 16 GB beside everything else
DECODE_STEPS = 24


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of the task (of one step, for decoding), and the most memory held meanwhile."""

    task: str
    arm: str
    length: int
    seconds: float | None = None
    peak_gib: float | None = None
    cache_gib: float | None = None
    vs_dense: float | None = None
    why: str | None = None


def run(
    tasks: tuple[tuple[str, int], ...],
    num_layers: int = 32,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure every (task, length) of "prefill", "train" and "decode" in every arm; `keep` as for `cache.run`.

    Raises:
        BenchmarkError: no GPU, or arms that do not compute what they should.
    """
    need_gpu()
    model = build(num_layers)
    result = {**environment(commit), "geometry": {**LLAMA_8B, "num_hidden_layers": num_layers}}
    result["checks"] = [_check(model)]
    say(f"check: S2 with every block in reach against dense, logits {result['checks'][0]}")
    if not result["checks"][0]["passed"]:
        raise BenchmarkError("a patch that reaches every block does not give the dense logits: nothing is timed")
    result["rows"] = []
    for task, length in tasks:
        dense = None
        for arm in ARMS:
            with _arm(model, arm):
                row = _measured(task, arm, length, model, dense)
            dense = row if dense is None else dense
            say(format_row(row))
            result["rows"].append(asdict(row))
            keep(result)
    return result


def place(row: dict[str, Any]) -> tuple[int, int, int]:
    """A row's place in a result: by task, length, and the order of `ARMS`; an arm that is no more comes last."""
    arms = list(ARMS)
    arm = arms.index(row["arm"]) if row["arm"] in arms else len(arms)
    return TASKS.index(row["task"]), row["length"], arm


def format_row(row: Row) -> str:
    """One line of the table."""
    start = f"{row.task:8s} {row.arm:24s} {row.length:7d} "
    if row.why is not None:
        return start + row.why
    cache = "" if row.cache_gib is None else f"  cache {row.cache_gib:5.2f} GiB"
    ratio = "" if row.vs_dense is None else f"  {row.vs_dense:5.2f}x"
    return start + f"{row.seconds:8.3f} s  peak {row.peak_gib:5.1f} GiB{cache}{ratio}"


def build(num_layers: int) -> nn.Module:
    """A Llama of `LLAMA_8B` with random weights, bf16, on the GPU."""
    return random_llama({**LLAMA_8B, "num_hidden_layers": num_layers})


@torch.no_grad()
def _check(model: nn.Module) -> dict[str, Any]:
    """A pattern whose window covers the text is dense attention: the logits may differ by what bf16 rounds."""
    ids = _ids(1500)
    dense = model(ids, logits_to_keep=64).logits.float()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        other = model(ids, logits_to_keep=64).logits.float()
    with patched(model, S2(local_blocks=64)):
        ours = model(ids, logits_to_keep=64).logits.float()
    return between_backends(ours, other, dense)


@contextmanager
def _arm(model: nn.Module, arm: str) -> Iterator[None]:
    if ARMS[arm] is None:
        yield
        return
    with patched(model, S2(), layers=ARMS[arm]):
        yield


def _measured(task: str, arm: str, length: int, model: nn.Module, dense: Row | None) -> Row:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = {"prefill": _prefill, "train": _train, "decode": _decode}[task]
    try:
        seconds, cache_bytes = run(model, length, ARMS[arm] is not None)
    except torch.OutOfMemoryError:
        return Row(task, arm, length, why="out of memory")
    ratio = None if dense is None or dense.seconds is None else dense.seconds / seconds
    cache = None if cache_bytes is None else cache_bytes / 2**30
    return Row(task, arm, length, seconds, torch.cuda.max_memory_allocated() / 2**30, cache, ratio)


@torch.no_grad()
def _prefill(model: nn.Module, length: int, sparse: bool) -> tuple[float, None]:
    ids = _ids(length)
    model(_ids(2048), use_cache=False, logits_to_keep=1)  # compiles
    return _seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), repeats=2), None


@torch.no_grad()
def _decode(model: nn.Module, length: int, sparse: bool) -> tuple[float, int]:
    from transformers import DynamicCache

    cache: Any = S2Cache(model) if sparse else DynamicCache(config=model.config)
    model(_ids(length), past_key_values=cache, logits_to_keep=1)
    held = bytes_held(cache.layers)["device"]
    token = _ids(1)
    for _ in range(4):
        model(token, past_key_values=cache)
    torch.cuda.reset_peak_memory_stats()
    return _seconds(lambda: model(token, past_key_values=cache), repeats=DECODE_STEPS), held


def _train(model: nn.Module, length: int, sparse: bool) -> tuple[float, None]:
    wrapped = with_lora(model)
    ids, kept = _ids(length), min(LOSS_TOKENS, length)

    def step() -> None:
        logits = wrapped(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1 - kept :]).backward()
        wrapped.zero_grad()

    try:
        step()
        torch.cuda.reset_peak_memory_stats()
        return _seconds(step, repeats=2), None
    finally:
        checkpoint(model, False)
        model.disable_input_require_grads()
        wrapped.unload()
        model.eval()


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `run`, the device idle before and after."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _ids(length: int) -> torch.Tensor:
    return torch.randint(1000, 100000, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
