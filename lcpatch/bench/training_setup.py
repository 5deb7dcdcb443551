"""The sizes of `lcpatch bench training`: of a run, and of a try on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .geometry import LLAMA_8B


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
        full: tokens of parts f and g; `full_offloaded`: whether keys and values are in host memory.
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
    full: int = 204800
    full_offloaded: bool = False

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
    full=128,
    full_offloaded=True,
)
"""Sizes at which a CPU runs through every part, in seconds: a test of the benchmark, not a measurement."""


def random_ids(batch: int, length: int, setup: Setup, limit: int | None = None) -> Tensor:
    """[batch, length] on the setup's device, below `limit`; None: below its vocabulary's size."""
    generator = torch.Generator(setup.device).manual_seed(0)
    limit = limit or setup.geometry["vocab_size"]
    return torch.randint(10, limit, (batch, length), device=setup.device, generator=generator)
