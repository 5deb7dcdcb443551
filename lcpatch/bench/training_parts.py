"""The parts of `lcpatch bench training`, each a few arms on one model."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..patching import patched
from ..patterns.s2 import S2
from ..training import chunkwise, offload, spaco
from .geometry import random_llama, two_layers
from .lora import checkpoint, with_lora
from .training_setup import Setup, random_ids

S2_ALL = S2(64, 16, 16, sink_blocks=0)


@dataclass(frozen=True)
class Row:
    """One measurement; what does not apply is None."""

    part: str
    arm: str
    length: int
    seconds: float | None = None
    peak_gib: float | None = None
    ratio: float | None = None
    unit: str | None = None
    why: str | None = None


class Parts:
    """The parts, on one model; see `lcpatch.bench.training` for what they are.

    Args:
        setup: the sizes.
        note: what is told each row when it is there.
    """

    def __init__(self, setup: Setup, note: Callable[[Row], None]) -> None:
        self.setup, self.note = setup, note
        self.base = random_llama(setup.geometry, setup.device, setup.dtype)
        self.model = with_lora(self.base)

    def part_a(self) -> None:
        """A step under each attention."""
        first = None
        for name, arm in self._arms().items():
            with arm():
                row = self._measure("a", name, self.setup.step, lambda: self._whole(self.setup.step))
            first = first or row
            self._note(row, ratio=_over(first, row), unit=f"x the speed of {first.arm}")

    def part_b(self) -> None:
        """Slopes of the peak memory."""
        for options in ({}, {"offload": True}):
            name = f"SeCO, chunks of {self.setup.chunk}" + (", offloaded" if options else "")
            few, many = self.setup.lengths
            short = self._measure("b", name, few, partial(self._chunks, few, **options))
            self._note(short)
            long = self._measure("b", name, many, partial(self._chunks, many, **options))
            slope = None
            if short.peak_gib is not None and long.peak_gib is not None:
                slope = (long.peak_gib - short.peak_gib) * 2**30 / ((many - few) * self.setup.kappa)
            self._note(long, ratio=slope, unit="kappa a token")
        offload.POOL.release()

    def part_c(self) -> None:
        """SeCO's time, with and without checkpointing inside a chunk."""
        length = self.setup.both
        whole = self._measure("c", "checkpointed backward of everything", length, lambda: self._whole(length))
        self._note(whole)
        for chunk, attention, less in product(self.setup.wide, ("lcpatch", "cudnn"), (False, True)):
            checkpoint(self.base, less)
            name = f"SeCO {chunk}, {attention}" + (", checkpointed" if less else "")
            options = {"chunk": chunk, "attention": attention}
            row = self._measure("c", name, length, partial(self._chunks, length, **options))
            self._note(row, ratio=_over(row, whole), unit="of its time")
        checkpoint(self.base, True)

    def part_d(self) -> None:
        """SpaCO's time against that of its parts, measured alone."""
        length, chunk = self.setup.sparse, self.setup.chunk
        count = -(-(length - 1) // chunk)

        def timed(plan: spaco.Plan) -> Row:
            name = f"{sum(plan.kept)} of {count} chunks"
            return self._measure("d", name, length, lambda: self._chunks(length, estimator=lambda k: plan))

        first = self._measure("d", "first pass", length, lambda: self._first_pass(length))
        self._note(first)
        everything = timed(spaco.seco(count))
        self._note(everything)
        if first.seconds is None or everything.seconds is None:
            return  # without their times there is no bound
        forward, again = first.seconds, everything.seconds - first.seconds  # forward and backward of every chunk
        generator = torch.Generator().manual_seed(0)
        times, bounds = [], []
        for _ in range(self.setup.draws):
            plan = spaco.draw("bernoulli", count, 1 / 16, generator)
            row = timed(plan)
            if row.why is not None:
                self._note(row)
                continue
            times.append(row.seconds)
            bounds.append(forward + sum(plan.kept) / count * again)
            self._note(row, ratio=times[-1] / bounds[-1], unit="of its bound")
        if times:
            total, ratio = Row("d", f"{len(times)} draws", length, sum(times)), sum(times) / sum(bounds)
            self._note(total, ratio=ratio, unit="of their bound")

    def part_e(self) -> None:
        """How long a text's last two chunks still fit."""
        low, high = self.setup.limit
        step = 2 * self.setup.chunk
        while high - low >= 2 * step:
            middle = low + (high - low) // 2 // step * step
            row = self._measure("e", "last chunks, all on the GPU", middle, lambda n=middle: self._rehearse(n))
            self._note(row)
            low, high = (middle, high) if row.why is None else (low, middle)
        length = self.setup.limit_offloaded
        row = self._measure("e", "last chunks, offloaded", length, lambda: self._rehearse(length, offload=True))
        self._note(row, ratio=2 * length * self.setup.kappa / 2**30, unit="GiB of host memory for the whole text")

    def part_f(self) -> None:
        """One real step under S2."""
        with patched(self.model, S2_ALL):
            self._full("f", "SeCO, S2")

    def part_g(self) -> None:
        """One real dense step."""
        self._full("g", "SeCO, dense")

    def _full(self, part: str, arm: str) -> None:
        length, offloaded = self.setup.full, self.setup.full_offloaded
        if offloaded:
            offload.POOL.reserve(2 * length * self.setup.kappa)  # not a part of the step: the next finds it there
            arm += ", offloaded"
        self._note(self._measure(part, arm, length, lambda: self._chunks(length, offload=offloaded)))

    def _arms(self) -> dict[str, Callable[[], Any]]:
        dense = {
            "FA2": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
            "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        }
        if self.setup.device == "cpu":
            dense = {"SDPA": nullcontext}
        return dense | {
            "SF, groups of a quarter": lambda: patched(self.model, "sf"),
            "S2 64/16/16, all layers": lambda: patched(self.model, S2_ALL),
        }

    def _whole(self, length: int) -> None:
        ids, kept = random_ids(1, length, self.setup), min(self.setup.loss_tokens, length - 1)
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=kept + 1).logits[0, :-1]
        F.cross_entropy(logits.float(), ids[0, -kept:]).backward()
        self.model.zero_grad()

    def _chunks(self, length: int, chunk: int | None = None, **options: Any) -> None:
        ids = random_ids(1, length, self.setup)
        labels = ids.clone()
        labels[:, : -self.setup.loss_tokens] = -100
        size = chunk or self.setup.chunk
        chunkwise.backward(self.model, input_ids=ids, labels=labels, chunk_size=size, **options)
        self.model.zero_grad()

    def _first_pass(self, length: int) -> None:
        chunkwise.first_pass(self.model, length=length - 1, chunk_size=self.setup.chunk)  # the last token predicts none

    def _rehearse(self, length: int, **options: Any) -> None:
        chunkwise.rehearse(self.model, length=length, chunk_size=self.setup.chunk, **options)

    def _measure(self, part: str, arm: str, length: int, step: Callable[[], None]) -> Row:
        gc.collect()
        cuda = self.setup.device == "cuda"
        try:
            with two_layers(self.base):
                step()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            self.model.zero_grad()
            return Row(part, arm, length, why="out of memory")
        seconds = time.perf_counter() - start
        return Row(part, arm, length, seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else None)

    def _note(self, row: Row, **changes: Any) -> None:
        if row.why is None:
            row = Row(**{**asdict(row), **changes})
        self.note(row)


def _over(above: Row, below: Row) -> float | None:
    return above.seconds / below.seconds if above.seconds and below.seconds else None
