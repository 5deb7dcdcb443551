"""What a training step will take: a formula of the model's sizes with four constants, each from a measured row.

    seconds   = linear FLOPs * train_linear / linear_rate + attention FLOPs * density * 4.5 / attention_rate
    peak      = weights + trained * 16 bytes + tokens * (checkpoint of every layer + work of one layer)
    by chunks: seconds = 1.12 * (the same + a forward of all chunks but the last)
               peak    = weights + trained * 16 bytes + 2 * keys and values of the row + chunk * (checkpoints + work)

4.5 is a checkpointed step's attention in forwards: one, one again, and 2.5 for the backward. The constants were fitted
on three rows of kernels/results/model-nvidia-h100-80gb-hbm3.json (`FITTED`); the other rows of its prefills and
training steps come out within 6 %, and the tests check that they stay within 10. So do chunks of 4,096 and more, whose
factor is that of one row (`CHUNKED`). Offloading and other patterns than S2 are the formula's word alone.

By chunks a layer with a window of its own still holds the whole row's keys and values, as the second pass begins at the
row's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
FITTED = (("prefill", "dense", 32768), ("prefill", "dense", 131072), ("train", "dense", 32768))
"""Rows (task, arm, length) that the constants come from."""

ATTENTION_PASSES = 4.5
TRAINED_BYTES = 16  # fp32 weight, gradient and AdamW's two moments
CHUNKED = 1.12
"""Chunks over the formula: dense SeCO of 64K tokens in kernels/results/training-nvidia-h100-80gb-hbm3.json."""
LOGITS_GIB = 0.5  # of the fused loss: blocks of rows in fp32, and their gradients


@dataclass(frozen=True)
class Constants:
    """Args:
    linear_rate: FLOP/s of a forward's matrix products and all that is not attention.
    attention_rate: FLOP/s of dense causal attention in a forward.
    train_linear: what is not attention takes in a checkpointed LoRA step, in forwards.
    work: bytes that one layer's recomputation and backward hold, over 2 bytes * (8 hidden + 4 intermediate sizes).
    """

    linear_rate: float
    attention_rate: float
    train_linear: float
    work: float


H100 = Constants(linear_rate=5.092e14, attention_rate=5.527e14, train_linear=3.832, work=1.748)


@dataclass(frozen=True)
class Sizes:
    """What of a model matters.

    Args:
        weights: bytes of the frozen weights.
        linear: parameters of the layers' matrix products, as far as one token goes through them.
        head: parameters of the head.
        trained: parameters that are trained.
        layers: those that attend.
        depth: all of them.
        hidden: size of the residual stream.
        intermediate: of a gated MLP with as many parameters as a token goes through in the widest layer's.
        attention: query heads x head dim, mean over the layers.
        kv: bytes of a token's keys and values, all layers.
    """

    weights: int
    linear: int
    head: int
    trained: int
    layers: int
    depth: int
    hidden: int
    intermediate: int
    attention: int
    kv: int

    @property
    def checkpoints(self) -> int:
        """Bytes of a token's checkpoints: one hidden state a layer."""
        return 2 * self.depth * self.hidden

    @property
    def work(self) -> float:
        """Bytes of a token in the layer that is computed again."""
        return H100.work * 2 * (8 * self.hidden + 4 * self.intermediate)


def forward_seconds(sizes: Sizes, length: int, share: float) -> float:
    """Of one row's forward, without its head; `share` is the density of its attention."""
    return 2 * sizes.linear * length / H100.linear_rate + attention_flops(sizes, length) * share / H100.attention_rate


def step_seconds(sizes: Sizes, length: int, share: float, head_tokens: int, chunk: int = 0) -> float:
    """Of one row's checkpointed training step, the head run on `head_tokens`; by chunks if `chunk` is their size."""
    linear = 2 * sizes.linear * length * H100.train_linear + 6 * sizes.head * head_tokens
    attention = ATTENTION_PASSES * attention_flops(sizes, length) * share
    seconds = linear / H100.linear_rate + attention / H100.attention_rate
    if not 0 < chunk < length:
        return seconds
    return CHUNKED * (seconds + forward_seconds(sizes, length - chunk, share))


def peak_bytes(sizes: Sizes, length: int, *, offload: bool = False, chunk: int = 0) -> float:
    """Of a checkpointed training step: of a whole row, or of chunks of one."""
    fixed = sizes.weights + TRAINED_BYTES * sizes.trained + LOGITS_GIB * GIB
    per_token = sizes.checkpoints + sizes.work
    if chunk:
        held = 2 * sizes.kv * length * (2 / sizes.layers if offload else 1)  # offloaded: two layers' at a time
        return fixed + held + per_token * min(chunk, length)
    return fixed + length * (sizes.work if offload else per_token)


def fit(rows: Mapping[tuple[str, str, int], tuple[float, float]], sizes: Sizes, head_tokens: int) -> Constants:
    """The constants from the rows of `FITTED`, each (seconds, peak GiB).

    Args:
        rows: measured, by (task, arm, length).
        sizes: of the model that was measured.
        head_tokens: tokens that the head saw in a training step.
    """
    (short, _), (long, _), (step, peak) = (rows[key] for key in FITTED)
    few, many = FITTED[0][2], FITTED[1][2]
    # short = a few + b few^2, long = a many + b many^2
    square = (long / many - short / few) / (many - few)
    linear = short / few - square * few
    attention_rate = attention_flops(sizes, few) / (square * few**2)
    linear_rate = 2 * sizes.linear / linear
    rest = step - ATTENTION_PASSES * square * few**2 - 6 * sizes.head * head_tokens / linear_rate
    held = peak * GIB - sizes.weights - TRAINED_BYTES * sizes.trained - sizes.checkpoints * few - LOGITS_GIB * GIB
    work = held / few / (2 * (8 * sizes.hidden + 4 * sizes.intermediate))
    return Constants(linear_rate, attention_rate, rest / (linear * few), work)


def attention_flops(sizes: Sizes, length: int) -> float:
    """FLOPs of a forward's dense causal attention, all layers."""
    return 2.0 * sizes.layers * sizes.attention * length**2
