"""Every way to train a model on long rows: what fits a GPU, how long a step takes; by the formula of `step_cost`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..hf.models import full_attention_layers
from .model_sizes import attending, density, on_meta, sizes_of, window_of
from .step_cost import GIB, Sizes, peak_bytes, step_seconds
from .support import why_inexact


@dataclass(frozen=True)
class Row:
    """One way to train.

    Args:
        name: of the attention, and how memory is saved.
        flags: of `lcpatch train`.
        gib: peak memory of the GPU.
        seconds: of a step of one row.
        fits: whether the GPU has that memory.
    """

    name: str
    flags: str
    gib: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Every way to train a model on rows of one length.

    Args:
        rows: the ways.
        sizes: of the model.
        why_no_chunks: why it cannot be trained by chunks; None: it can.
        window: what layers with a window of their own attend within; None: there are none.
    """

    rows: list[Row]
    sizes: Sizes
    why_no_chunks: str | None
    window: int | None


def plan(
    config: Any, length: int, gib: float, *, attentions: Sequence[str] = ("full", "sf", "s2"), tune: str = "lora+"
) -> Plan:
    """Every way to train a model on rows of `length` tokens, and which fit a GPU with `gib` of memory; loads nothing.

    Args:
        config: the model's.
        length: tokens of a row.
        gib: memory of the GPU; a tenth of it is left for what the allocator cannot use.
        attentions: arms, as `--attention` takes them.
        tune: as `--tune` takes it.

    Raises:
        UnsupportedModelError: a model that `tune` or a patch does not take.
    """
    model = on_meta(config)
    config = config.get_text_config()  # of several parts, where the model is only its text's
    why_no_chunks = why_inexact(model, config, length)
    sizes = sizes_of(model, tune)
    rows = []
    for attention in attentions:
        for name, flags, share, chunk, offload in _ways(config, attention, length):
            if chunk and why_no_chunks:
                continue
            peak = peak_bytes(sizes, length, offload=offload, chunk=chunk) / GIB
            seconds = step_seconds(sizes, length, share, head_tokens=length, chunk=chunk)
            rows.append(Row(name, flags, peak, seconds, peak <= 0.9 * gib))
    return Plan(rows, sizes, why_no_chunks, window_of(config))


def _ways(config: Any, attention: str, length: int) -> Iterator[tuple[str, str, float, int, bool]]:
    """(name, flags, density, chunk, offload) of each way to train under one arm."""
    grouped = attention in ("sf", "shift", "short")
    chunk = 4096
    for layers in [None, *_every_2nd(config)] if attention == "s2" else [None]:
        share = density(config, attention, {}, layers, length)
        words = layers if isinstance(layers, str) else ",".join(map(str, layers or ()))
        base = f"--attention {attention}" + (f" --layers {words}" if layers else "")
        name = attention + (", every 2nd layer" if layers else "")
        yield name, base, share, 0, False
        yield f"{name}, offloaded", f"{base} --offload", share, 0, True
        fixed = f" --group-size {-(-length // 4)}" if grouped else ""
        yield f"{name}, SeCO", f"{base}{fixed} --chunk-size {chunk}", share, chunk, False
        yield f"{name}, SeCO, offloaded", f"{base}{fixed} --chunk-size {chunk} --offload", share, chunk, True


def _every_2nd(config: Any) -> list[Any]:
    """Every second layer that a pattern can govern, as `--layers` takes it; nothing where there is but one."""
    every = attending(config)
    full = full_attention_layers(config, every)
    return [] if len(full) < 2 else ["every_2" if len(full) == config.num_hidden_layers else full[::2]]
