"""What a training step will take: a formula of the model's sizes with four constants, each from a measured row.

    seconds   = linear FLOPs * train_linear / linear_rate + attention FLOPs * density * 4.5 / attention_rate
    peak      = weights + trained * 16 bytes + tokens * (checkpoint of every layer + work of one layer)
    by chunks: seconds = 1.12 * (the same + a forward of all chunks but the last)
               peak    = weights + trained * 16 bytes + 2 * keys and values of the row + chunk * (checkpoints + work)

4.5 is a checkpointed step's attention in forwards: one, one again, and 2.5 for the backward. The constants were fitted
on three rows of kernels/results/model-nvidia-h100-80gb-hbm3.json (`FITTED`); the other rows of its prefills and
training steps come out within 6 %, and the tests check that they stay within 10. So do chunks of 4,096 and more, whose
factor is that of one row (`CHUNKED`). Offloading and other patterns than S2 are the formula's word alone.

Of experts a token's time is that of those it is routed to, while all of them are weights. A layer with a window of its
own takes the window's time; by chunks it still holds the whole row's keys and values, as the second pass begins at the
row's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import UnsupportedModelError
from ..hf.layers import head_dim_of, num_kv_heads_of, shape_of
from ..hf.models import attention_modules, full_attention_layers
from ..hf.state import own_spec
from ..patching.resolve import pattern_of, sparse_layers
from . import arms, lora
from .support import KINDS, why_inexact

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

    def work(self, constants: Constants) -> float:
        """Bytes of a token in the layer that is computed again."""
        return constants.work * 2 * (8 * self.hidden + 4 * self.intermediate)


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


def sizes_of(config: Any, tune: str = "lora+") -> Sizes:
    """The sizes of a model with `config`, whose weights are bf16; nothing is loaded.

    Raises:
        UnsupportedModelError: a model that `tune` or a patch does not take.
    """
    model = _on_meta(config)
    modules = attention_modules(model)
    config = config.get_text_config()  # of several parts, where the model is only its text's
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    behind = {id(p) for m in (head, embeddings) for p in m.parameters()}
    linear = sum(_active(config, n, p) for n, p in model.named_parameters() if id(p) not in behind)
    shape = shape_of(config, 0, 1)
    keys = sum(head_dim_of(module) * num_kv_heads_of(config, layer) for layer, module in modules.items())
    intermediate = max(_active_in_mlp(config, model, module) for module in modules.values()) // (3 * config.hidden_size)
    with torch.device("meta"):
        trained = sum(p.numel() for p in lora.trainable(lora.prepare(model, tune)))
    return Sizes(
        weights=0 if tune == "full" else 2 * total,  # those that are trained are counted in fp32
        linear=linear,
        head=head.weight.numel(),
        trained=trained,
        layers=len(modules),
        depth=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate,
        attention=shape.num_heads * sum(map(head_dim_of, modules.values())) // len(modules),
        kv=2 * 2 * keys,
    )


def _on_meta(config: Any) -> Any:
    """The model of a config in bf16, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _active(config: Any, name: str, parameter: torch.Tensor) -> int:
    """How many of a parameter's numbers one token goes through: of experts [E, …], those that it is routed to."""
    if ".experts." not in name:
        return parameter.numel()
    routed = getattr(config, "num_experts_per_tok", None)
    if routed is None:
        raise UnsupportedModelError(f"{config.model_type}: its config has no num_experts_per_tok, which a plan needs")
    return parameter.numel() // len(parameter) * routed


def _active_in_mlp(config: Any, model: torch.nn.Module, attention: torch.nn.Module) -> int:
    """The same of the matrices beside `attention` in its layer."""
    layer = next(m for m in model.modules() if attention in m.children())
    own = {id(p) for p in attention.parameters()}
    return sum(_active(config, n, p) for n, p in layer.named_parameters() if p.dim() > 1 and id(p) not in own)


def density(config: Any, attention: str, options: Mapping[str, Any], layers: Any, length: int) -> float:
    """Pairs that an arm attends to over the causal ones, mean over the layers that attend; a window counts as well."""
    patch = arms.patch_for(attention, dict(options), layers)
    every = _attending(config)
    full = full_attention_layers(config, every)
    shares = dict.fromkeys(every, own_spec(1, window_of(config)).density(length)) | dict.fromkeys(full, 1.0)
    if patch.mode != "never":
        chosen, pattern = sparse_layers(patch.layers, config, every), pattern_of(patch)
        for rank, layer in enumerate(chosen):
            shares[layer] = pattern.spec(shape_of(config, rank, len(chosen), layer)).density(length)
    return sum(shares.values()) / len(shares)


def _attending(config: Any) -> list[int]:
    """The layers with attention; in some models others carry a state."""
    kinds = getattr(config, "layer_types", None) or [KINDS[0]] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind in KINDS]


def window_of(config: Any) -> int | None:
    """The tokens that those layers attend within that do not attend to their whole past; None: there are none."""
    every = _attending(config)
    if len(full_attention_layers(config, every)) == len(every):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def why_no_chunks(config: Any, length: int) -> str | None:
    """Why a model cannot be trained by chunks; None: it can."""
    return why_inexact(_on_meta(config), config, length)


def forward_seconds(
    sizes: Sizes, length: int, share: float, constants: Constants = H100, head_tokens: int = 0
) -> float:
    """Of one row's forward."""
    linear = 2 * (sizes.linear * length + sizes.head * head_tokens)
    return linear / constants.linear_rate + _attention(sizes, length) * share / constants.attention_rate


def step_seconds(
    sizes: Sizes, length: int, share: float, constants: Constants = H100, head_tokens: int = 0, chunk: int = 0
) -> float:
    """Of one row's checkpointed training step; by chunks if `chunk` is their size."""
    linear = 2 * sizes.linear * length * constants.train_linear + 6 * sizes.head * head_tokens
    attention = ATTENTION_PASSES * _attention(sizes, length) * share
    seconds = linear / constants.linear_rate + attention / constants.attention_rate
    if not 0 < chunk < length:
        return seconds
    return CHUNKED * (seconds + forward_seconds(sizes, length - chunk, share, constants))


def peak_bytes(
    sizes: Sizes, length: int, constants: Constants = H100, *, offload: bool = False, chunk: int = 0
) -> float:
    """Of a checkpointed training step: of a whole row, or of chunks of one."""
    fixed = sizes.weights + TRAINED_BYTES * sizes.trained + LOGITS_GIB * GIB
    per_token = sizes.checkpoints + sizes.work(constants)
    if chunk:
        held = 2 * sizes.kv * length * (2 / sizes.layers if offload else 1)  # offloaded: two layers' at a time
        return fixed + held + per_token * min(chunk, length)
    return fixed + length * (sizes.work(constants) if offload else per_token)


def plan(
    config: Any, length: int, gib: float, *, attentions: Sequence[str] = ("full", "sf", "s2"), tune: str = "lora+"
) -> list[Row]:
    """Every way to train a model on rows of `length` tokens on a GPU with `gib` of memory, and that it can be trained.

    Args:
        config: the model's.
        length: tokens of a row.
        gib: memory of the GPU; a tenth of it is left for what the allocator cannot use.
        attentions: arms, as `--attention` takes them.
        tune: as `--tune` takes it.
    """
    sizes = sizes_of(config, tune)
    config = config.get_text_config()
    whole_rows = why_no_chunks(config, length) is not None
    rows = []
    for attention in attentions:
        for name, flags, share, chunk, offload in _ways(config, attention, length):
            if chunk and whole_rows:
                continue
            peak = peak_bytes(sizes, length, offload=offload, chunk=chunk) / GIB
            seconds = step_seconds(sizes, length, share, head_tokens=length, chunk=chunk)
            rows.append(Row(name, flags, peak, seconds, peak <= 0.9 * gib))
    return rows


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
    every = _attending(config)
    full = full_attention_layers(config, every)
    return [] if len(full) < 2 else ["every_2" if len(full) == config.num_hidden_layers else full[::2]]


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
    attention_rate = _attention(sizes, few) / (square * few**2)
    linear_rate = 2 * sizes.linear / linear
    rest = step - ATTENTION_PASSES * square * few**2 - 6 * sizes.head * head_tokens / linear_rate
    held = peak * GIB - sizes.weights - TRAINED_BYTES * sizes.trained - sizes.checkpoints * few - LOGITS_GIB * GIB
    work = held / few / (2 * (8 * sizes.hidden + 4 * sizes.intermediate))
    return Constants(linear_rate, attention_rate, rest / (linear * few), work)


def _attention(sizes: Sizes, length: int) -> float:
    """FLOPs of a forward's dense causal attention, all layers."""
    return 2.0 * sizes.layers * sizes.attention * length**2
