"""`torchrun … -m lcpatch.cli bench parallel --step`: a LoRA step of an 8B model, on one GPU and shared by all.

First a short row: the ranks' gradients must be one GPU's, up to a multiple of what another kernel for dense attention
makes of them. Then a long one is timed on every GPU alone, each with all of it, and on all together; the slowest
counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import BenchmarkError
from ..patching import patched
from ..patterns.s2 import S2
from ..training.fused import fused_loss
from ..training.parallel import Parallel, parallelize
from .environment import environment
from .geometry import LLAMA_8B, random_llama, two_layers
from .judge import passes, relative_error
from .lora import with_lora
from .ranks import all_gpus, over_ranks

CHECK_LENGTH = 2056
GROUP = 8192  # of SF; a group that grows with the row would have nothing to gain from more GPUs
FACTOR = 3  # times the distance of two dense kernels: parts are rounded before they are added up


@dataclass(frozen=True)
class Row:
    """A step under one attention on one GPU or on several; seconds and GiB of the rank that needs most."""

    arm: str
    length: int
    ranks: int
    seconds: float | None = None
    peak_gib: float | None = None
    speedup: float | None = None
    strategy: str = ""
    why: str | None = None


def run(
    lengths: Sequence[int], commit: str | None = None, say: Callable = print, keep: Callable = lambda result: None
) -> dict[str, Any]:
    """Check, then time; on rank 0 what `keep` is given after every length, elsewhere {}.

    Raises:
        BenchmarkError: no torchrun, no GPUs, or gradients that are not one GPU's: nothing is timed then.
    """
    geometry = {**LLAMA_8B, "max_position_embeddings": max(lengths)}
    result: dict[str, Any] = {}
    with all_gpus("--step"):
        first = dist.get_rank() == 0
        if first:
            result = {**environment(commit), "ranks": dist.get_world_size(), "geometry": geometry, "rows": []}
        steps = Steps(with_lora(random_llama(geometry)), say if first else _silent)
        steps.check()
        for length in lengths:
            rows = [asdict(row) for row in steps.timed(length)]
            if first:
                result["rows"] += rows
                keep(result)
    return result


def _silent(line: str) -> None:
    """What the other ranks say."""


class Steps:
    """Steps of one model, on this rank."""

    def __init__(self, model: nn.Module, say: Callable[[str], None]) -> None:
        self.model, self.say, self.ranks = model, say, dist.get_world_size()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.vocab, self.device = model.get_input_embeddings().num_embeddings, next(model.parameters()).device
        self.cuda = self.device.type == "cuda"

    def arms(self, group: int = GROUP, blocks: int = 16) -> dict[str, Callable[[], Any]]:
        """What patches the model, by name; smaller where a short row is to be sparse."""
        return {
            "dense": nullcontext,
            f"SF, G = {group}": lambda: patched(self.model, "sf", group_size=group),
            f"S2 64/{blocks}/{blocks}": lambda: patched(self.model, S2(64, blocks, blocks, sink_blocks=0)),
        }

    def check(self) -> None:
        """Gradients of a short row.

        Raises:
            BenchmarkError: they are not one GPU's.
        """
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            dense = self._gradients(CHECK_LENGTH)
        with sdpa_kernel(SDPBackend.MATH):
            other = self._gradients(CHECK_LENGTH)
        budget = FACTOR * relative_error(other, dense)
        for name, arm in self.arms(CHECK_LENGTH // 4, 4).items():
            with arm():
                alone = self._gradients(CHECK_LENGTH)
                with parallelize(self.model) as ranks:
                    error = relative_error(self._gradients(CHECK_LENGTH, ranks), alone)
            worst, allowed = over_ranks([error, budget], self.device)
            self.say(f"check {name:18s} gradients of {self.ranks} ranks {worst:.1e} <= {allowed:.1e}")
            if not passes(worst, allowed):
                raise BenchmarkError(f"{name}: gradients are {worst:.1e} from one GPU's: nothing is timed")

    def timed(self, length: int) -> Iterator[Row]:
        """Rows of every arm, on one GPU and on all."""
        for name, arm in self.arms().items():
            with arm():
                alone = self._timed(Row(name, length, 1), None)
                yield alone
                with parallelize(self.model) as ranks:
                    row = self._timed(Row(name, length, self.ranks), ranks)
                    strategies = sorted({why.partition(":")[0] for why in ranks.chosen.values()})
            speedup = alone.seconds / row.seconds if alone.seconds and row.seconds else None
            yield replace(row, speedup=speedup, strategy=", ".join(strategies))

    def _timed(self, row: Row, ranks: Parallel | None) -> Row:
        gc.collect()
        seconds, peak = 0.0, 0.0
        if self._all_can(lambda: self._short_step(row.length, ranks), ranks):
            start = time.perf_counter()
            if self._all_can(lambda: self._step(row.length, ranks), ranks):
                seconds = time.perf_counter() - start
                peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        self.model.zero_grad()
        seconds, peak = over_ranks([seconds, peak], self.device)
        if seconds:
            row = replace(row, seconds=seconds, peak_gib=peak)
        else:
            row = replace(row, why="out of memory")
        took = row.why or f"{row.seconds:.2f} s, {row.peak_gib:.1f} GiB"
        self.say(f"{row.arm:18s} {row.length:7d} tokens on {row.ranks} GPUs: {took}")
        return row

    def _all_can(self, step: Callable[[], None], ranks: Parallel | None) -> bool:
        """Whether no rank lacks memory for `step`; all come out of it together."""
        failed = False
        try:
            step()
        except torch.OutOfMemoryError:
            if ranks is not None:
                raise  # the others wait in an exchange
            failed = True
        return not any(over_ranks([failed], self.device))

    def _short_step(self, length: int, ranks: Parallel | None) -> None:
        with two_layers(self.model.get_base_model()):
            self._step(length, ranks)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _step(self, length: int, ranks: Parallel | None) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        ids = torch.randint(10, self.vocab, (1, length), device=self.device, generator=generator)
        batch = {"input_ids": ids, "labels": ids, "use_cache": False}
        if ranks is None:
            fused_loss(self.model, batch).backward()
            return
        part = ranks.shard(batch)
        count = part.pop("num_items_in_batch")
        fused_loss(self.model, part, count).backward()
        ranks.sum_gradients(self.trained)

    def _gradients(self, length: int, ranks: Parallel | None = None) -> Tensor:
        self.model.zero_grad()
        self._step(length, ranks)
        found = torch.cat([p.grad.flatten().float() for p in self.trained if p.grad is not None])
        self.model.zero_grad()
        return found
