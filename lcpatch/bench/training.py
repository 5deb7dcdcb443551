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

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BenchmarkError
from ..training import chunkwise, spaco
from .environment import environment, need_gpu
from .geometry import random_llama
from .judge import passes, relative_error
from .training_parts import Parts, Row
from .training_setup import Setup, random_ids

PARTS = ("a", "b", "c", "d", "e", "f", "g")
DEFAULT = PARTS[:5]
FULL = PARTS[5:]
"""Those that take one length, which can be asked for."""


def run(
    parts: Sequence[str] = DEFAULT,
    setup: Setup | None = None,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure the parts that are asked for; gives `keep` the result after each row as it is.

    Args:
        parts: out of `PARTS`.
        setup: the sizes; None: those of a GPU.

    Raises:
        BenchmarkError: no GPU, or chunks that do not give the gradient they should.
    """
    setup = setup or Setup()
    if setup.device == "cuda":
        need_gpu()
    result = {**environment(commit), "geometry": setup.geometry, "kappa": setup.kappa, "checks": [check(setup)]}
    say(f"check: gradient by chunks against a plain one: {result['checks'][0]}")
    if not result["checks"][0]["passed"]:
        raise BenchmarkError("chunks do not give the gradient of a plain backward: nothing is timed")
    result["rows"] = []

    def note(row: Row) -> None:
        say(format_row(row))
        result["rows"].append(asdict(row))
        keep(result)

    found = Parts(setup, note)
    for part in parts:
        getattr(found, f"part_{part}")()
    return result


def place(row: dict[str, Any]) -> int:
    """A row's place in a result: by part, and in it as measured."""
    return PARTS.index(row["part"])


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
    ids = random_ids(1, length, setup, 1000)

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
        name: relative_error(gradient(run, setup.dtype), exact)
        for name, run in {
            "plain": plain,
            "chunks": chunks,
            "offloaded": lambda m: chunks(m, offload=True),
            "no hops": lambda m: chunks(m, estimator=lambda k: spaco.seco(k, hop=0.0)),
        }.items()
    }
    budget = 2 * errors["plain"]
    passed = passes(max(errors["chunks"], errors["offloaded"]), budget) and budget < errors["no hops"]
    return {"errors": errors, "budget": budget, "passed": passed}
