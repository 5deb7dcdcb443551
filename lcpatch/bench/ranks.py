"""Several processes that measure together, a GPU each: how they meet, and agree on a number."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..core.errors import BenchmarkError


@contextmanager
def all_gpus(option: str) -> Iterator[None]:
    """A group of this process's peers over NCCL, this process on its GPU.

    Args:
        option: of `lcpatch bench parallel`, for the message.

    Raises:
        BenchmarkError: no torchrun, or no GPUs.
    """
    if "RANK" not in os.environ or not torch.cuda.is_available():
        raise BenchmarkError(
            f"{option} needs a GPU for each rank: torchrun --nproc-per-node gpu -m lcpatch.cli bench parallel {option}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    yield
    dist.destroy_process_group()  # not after an error of one rank: it would wait for the others, which wait for it


def over_ranks(numbers: Sequence[float], device: torch.device | str) -> list[float]:
    """The largest of each over all ranks; of errors and budgets alike, so that all ranks come to the same verdict.

    A rank's own budget is rounded in its own way, and a rank that stopped alone would let the others wait.
    """
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()
