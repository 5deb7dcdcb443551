"""`lcpatch bench training`: a LoRA step of a long text: sparse against dense, SeCO's memory and time, SpaCO, the limit.

The model has the geometry of Llama-3.1-8B and random weights; LoRA r = 8 on the attention projections, bf16, batch 1,
gradient checkpointing, the loss on the last tokens. Nothing is timed unless chunks give the gradient of a plain
backward at a small size first.

    a  a step under FlashAttention-2, cuDNN, SF (groups of a quarter) and S2 (64/16/16, all layers)
    b  growth of the peak memory with the length, in kappa (what a KV cache holds of a token), on the GPU and offloaded
    c  SeCO against checkpointed backpropagation of everything, at a length that both hold
    d  SpaCO, a sixteenth kept, against F + n/k (F + B): F is SeCO's first pass, F + B what it runs after it, of all k
       chunks, n of them are kept. What no kept chunk reads is not run, so a draw may take less
    e  the longest text: memory of the last two chunks, where the peak is, with the rest of the text only allocated
    f  one real SeCO step at a given length under S2
    g  the same with dense attention, whose time grows with the square of the length
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import BenchmarkError
from ..patching import patched
from ..patterns.s2 import S2
from ..training import chunkwise, offload, spaco
from . import measure
from .geometry import LLAMA_8B, random_llama

PARTS = ("a", "b", "c", "d", "e", "f", "g")
S2_ALL = S2(64, 16, 16, sink_blocks=0)


@dataclass(frozen=True)
class Setup:
    """Sizes of a run.

    Args:
        geometry: of the Llama.
        device, dtype: where and in what it runs.
        step: tokens of part a; `lengths`: the two of b; `both`: of c; `sparse`: of d; `limit`: of e, where to look.
        chunk: tokens of a chunk; `wide`: of part c, where no checkpointing is needed inside it.
        loss_tokens: tokens at the end that have a label.
        draws: of part d.
        full: tokens of parts f and g, and whether keys and values are in host memory.
    """

    geometry: dict[str, int] = field(default_factory=lambda: {**LLAMA_8B, "max_position_embeddings": 1 << 20})
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    step: int = 65536
    lengths: tuple[int, int] = (16384, 49152)
    both: int = 32768
    sparse: int = 65536
    limit: tuple[int, int] = (131072, 262144)
    limit_offloaded: int = 393216
    chunk: int = 4096
    wide: tuple[int, ...] = (4096, 8192)
    loss_tokens: int = 4096
    draws: int = 8
    full: tuple[int, bool] = (204800, False)

    @property
    def kappa(self) -> int:
        """Bytes that a KV cache holds of a token."""
        g = self.geometry
        head_dim = g["hidden_size"] // g["num_attention_heads"]
        return 2 * g["num_hidden_layers"] * g["num_key_value_heads"] * head_dim * self.dtype.itemsize


TINY = Setup(
    geometry={
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    device="cpu",
    dtype=torch.float32,
    step=128,
    lengths=(64, 128),
    both=128,
    sparse=128,
    limit=(64, 192),
    limit_offloaded=128,
    chunk=32,
    wide=(64,),
    loss_tokens=32,
    draws=1,
    full=(128, True),
)
"""Sizes at which a CPU runs through every part, in seconds: a test of the benchmark, not a measurement."""


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


def run(
    parts: str = "abcde",
    setup: Setup | None = None,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure the parts that are asked for; gives `keep` the result after each row as it is.

    Raises:
        BenchmarkError: no GPU, or chunks that do not give the gradient they should.
    """
    setup = setup or Setup()
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("this benchmark needs a CUDA GPU; torch.cuda.is_available() is False")
    result = {**measure.environment(commit), "geometry": setup.geometry, "kappa": setup.kappa, "checks": [check(setup)]}
    say(f"check: gradient by chunks against a plain one: {result['checks'][0]}")
    if not result["checks"][0]["passed"]:
        raise BenchmarkError("chunks do not give the gradient of a plain backward: nothing is timed")
    result["rows"] = []

    def note(row: Row) -> None:
        say(format_row(row))
        result["rows"].append(asdict(row))
        keep(result)

    bench = Bench(setup, note)
    for part in parts:
        getattr(bench, f"part_{part}")()
    return result


def format_row(row: Row) -> str:
    """One line of the output."""
    start = f"{row.part}  {row.arm:34s} {row.length:7d} "
    if row.why is not None:
        return start + row.why
    seconds = " " * 10 if row.seconds is None else f"{row.seconds:8.3f} s"
    peak = "" if row.peak_gib is None else f"  peak {row.peak_gib:5.1f} GiB"
    return start + seconds + peak + ("" if row.ratio is None else f"  {row.ratio:6.3f} {row.unit}")


def check(setup: Setup) -> dict[str, Any]:
    """Gradients of a small model by chunks, on the device and offloaded, against higher precision.

    The budget is twice the error of a plain backward in the same dtype; without hops it must be exceeded.
    """
    sizes = {"num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 1000}
    small = {**setup.geometry, "hidden_size": min(1024, setup.geometry["hidden_size"]), **sizes}
    small["num_attention_heads"] = small["hidden_size"] // (128 if setup.device == "cuda" else 8)
    small["num_key_value_heads"] = small["num_attention_heads"] // 2
    length, chunk = 16 * 50 + 7, 16 * 16
    model = random_llama(small, setup.device, setup.dtype)
    ids = _ids(1, length, setup, 1000)

    def gradient(run: Callable[[nn.Module], Any], dtype: torch.dtype) -> Tensor:
        twin = random_llama(small, setup.device, setup.dtype).to(dtype)
        twin.load_state_dict(model.state_dict())
        run(twin.train())
        return torch.cat([p.grad.flatten().double() for p in twin.parameters()])

    def plain(m: nn.Module) -> None:
        m(ids, labels=ids, use_cache=False).loss.backward()

    def chunks(m: nn.Module, **options: Any) -> None:
        chunkwise.backward(m, input_ids=ids, labels=ids, chunk_size=chunk, **options)

    higher = torch.float64 if setup.dtype == torch.float32 else torch.float32
    exact = gradient(plain, higher)
    errors = {
        name: ((gradient(run, setup.dtype) - exact).norm() / exact.norm()).item()
        for name, run in {
            "plain": plain,
            "chunks": chunks,
            "offloaded": lambda m: chunks(m, offload=True),
            "no hops": lambda m: chunks(m, estimator=lambda k: spaco.seco(k, hop=0.0)),
        }.items()
    }
    budget = 2 * errors["plain"]
    passed = max(errors["chunks"], errors["offloaded"]) <= budget < errors["no hops"]
    return {"errors": errors, "budget": budget, "passed": passed}


class Bench:
    """The parts, on one model.

    Args:
        setup: the sizes.
        note: what is told each row when it is there.
    """

    def __init__(self, setup: Setup, note: Callable[[Row], None]) -> None:
        from peft import LoraConfig, get_peft_model

        self.setup, self.note = setup, note
        self.base = random_llama(setup.geometry, setup.device, setup.dtype)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.model = get_peft_model(self.base, lora).train()
        self.base.enable_input_require_grads()
        self._checkpoint(True)

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
        for chunk, attention, checkpoint in product(self.setup.wide, ("lcpatch", "cudnn"), (False, True)):
            self._checkpoint(checkpoint)
            name = f"SeCO {chunk}, {attention}" + (", checkpointed" if checkpoint else "")
            options = {"chunk": chunk, "attention": attention}
            row = self._measure("c", name, length, partial(self._chunks, length, **options))
            self._note(row, ratio=_over(row, whole), unit="of its time")
        self._checkpoint(True)

    def part_d(self) -> None:
        """SpaCO's time against that of its parts, measured alone."""
        length, chunk = self.setup.sparse, self.setup.chunk
        count = -(-(length - 1) // chunk)

        def timed(plan: spaco.Plan) -> Row:
            name = f"{sum(plan.kept)} of {count} chunks"
            return self._measure("d", name, length, lambda: self._chunks(length, estimator=lambda k: plan))

        first = self._measure("d", "first pass", length, lambda: self._first_pass(length))
        everything = timed(spaco.seco(count))
        forward = first.seconds
        again = everything.seconds - forward  # forward and backward of every chunk
        self._note(first)
        self._note(everything)
        generator = torch.Generator().manual_seed(0)
        taken = allowed = 0.0
        for _ in range(self.setup.draws):
            plan = spaco.draw("bernoulli", count, 1 / 16, generator)
            row = timed(plan)
            bound = forward + sum(plan.kept) / count * again
            taken, allowed = taken + row.seconds, allowed + bound
            self._note(row, ratio=row.seconds / bound, unit="of its bound")
        self._note(Row("d", f"{self.setup.draws} draws", length, taken), ratio=taken / allowed, unit="of their bound")

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
        length, offloaded = self.setup.full
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

    @contextmanager
    def _two_layers(self) -> Iterator[None]:
        """For a while a model of two layers: compiles, and makes cuDNN's plans, for the shapes that are timed next.

        The last one's attention is not run where nothing reads it.
        """
        decoder, config = self.base.model, self.base.config
        layers, count = decoder.layers, config.num_hidden_layers
        decoder.layers, config.num_hidden_layers = layers[:2], 2
        try:
            yield
        finally:
            decoder.layers, config.num_hidden_layers = layers, count

    def _whole(self, length: int) -> None:
        ids, kept = _ids(1, length, self.setup), min(self.setup.loss_tokens, length - 1)
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=kept + 1).logits[0, :-1]
        F.cross_entropy(logits.float(), ids[0, -kept:]).backward()
        self.model.zero_grad()

    def _chunks(self, length: int, chunk: int | None = None, **options: Any) -> None:
        ids = _ids(1, length, self.setup)
        labels = ids.clone()
        labels[:, : -self.setup.loss_tokens] = -100
        size = chunk or self.setup.chunk
        chunkwise.backward(self.model, input_ids=ids, labels=labels, chunk_size=size, **options)
        self.model.zero_grad()

    def _first_pass(self, length: int) -> None:
        chunkwise.first_pass(self.model, length=length - 1, chunk_size=self.setup.chunk)  # the last token predicts none

    def _rehearse(self, length: int, **options: Any) -> None:
        chunkwise.rehearse(self.model, length=length, chunk_size=self.setup.chunk, **options)

    def _checkpoint(self, on: bool) -> None:
        names = ("activation_checkpointing", "gradient_checkpointing")  # transformers before 5.23 has the second only
        name = next(n for n in names if hasattr(self.base, f"{n}_enable"))
        getattr(self.base, f"{name}_enable")({"use_reentrant": False}) if on else getattr(
            self.base, f"{name}_disable"
        )()

    def _measure(self, part: str, arm: str, length: int, step: Callable[[], None]) -> Row:
        gc.collect()
        cuda = self.setup.device == "cuda"
        try:
            with self._two_layers():
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


def _ids(batch: int, length: int, setup: Setup, limit: int | None = None) -> Tensor:
    generator = torch.Generator(setup.device).manual_seed(0)
    limit = limit or setup.geometry["vocab_size"]
    return torch.randint(10, limit, (batch, length), device=setup.device, generator=generator)
