"""Real ranks: processes on this machine that talk through gloo. One start serves a whole list of cases."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
"""Of a collective: a test that hangs fails after it."""


def run_world(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240, backend: str = "gloo"
) -> list[Any]:
    """`function(rank, *args)` in `num_ranks` processes of one group; under nccl each has a GPU.

    Returns:
        What each rank returned; for one that raised its exception's text ("Type: message"), for one that died None.
    """
    context = mp.get_context("spawn")
    # Kept here, so that it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, store.port, answers, backend, function, args))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < num_ranks:
            try:
                rank, result = answers.get(timeout=0.2)
                results[rank] = result
                continue
            except queue.Empty:
                pass
            dead = [r for r, p in enumerate(ranks) if not p.is_alive() and r not in results]
            if dead and answers.empty():
                results |= dict.fromkeys(dead)
            assert time.monotonic() < deadline, f"ranks {sorted(set(range(num_ranks)) - set(results))} hang"
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return [results[rank] for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, port: int, answers: Any, backend: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    answers.put((rank, result))
