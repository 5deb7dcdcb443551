"""One model and one text, dense and under each method: what the demo measures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from lcpatch_kernels import DENSE, BlockSparseSpec

from ..eval import token_nll
from ..hf.layers import state_of
from ..hf.models import attention_modules
from ..patching import patched
from ..patterns import patterns

NEW_TOKENS = 24


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Args:
        name: "dense" or a method.
        options: what it was set up with.
        spec: the pattern of the first layer.
        density: pairs attended over causal pairs, mean over heads and layers.
        nll: [T - 1], what each token cost.
        seconds: time to read the text and score it.
        continuation: what the model writes next.
    """

    name: str
    options: dict[str, Any]
    spec: BlockSparseSpec
    density: float
    nll: Tensor
    seconds: float
    continuation: str


def compare(model: nn.Module, tokenizer: Any, input_ids: Tensor, methods: Sequence[str]) -> list[Arm]:
    """Run `model` on `input_ids` [1, T] densely and under each of `methods`, with mode="always"."""
    options = {name: sparse_options(name, input_ids.shape[1]) for name in methods}
    token_nll(model, input_ids[:, :64])  # or the first arm would pay for the warm-up
    arms = []
    for name in ("dense", *methods):
        patch = nullcontext() if name == "dense" else patched(model, name, mode="always", **options[name])
        with patch:
            arms.append(_run(model, tokenizer, input_ids, name, options.get(name, {})))
    return arms


def sparse_options(method: str, length: int) -> dict[str, Any]:
    """Options with which a method is really sparse at `length` tokens, and defined while a text still grows.

    Chosen by an option's name, so that a new method needs no entry.
    """
    sizes = {"group_size": 512, "window": max(1, length // 8), "local_blocks": max(1, length // 1024), "stride": 8}
    known = patterns.get(method)().to_options()
    return {name: value for name, value in sizes.items() if name in known}


def _run(model: nn.Module, tokenizer: Any, input_ids: Tensor, name: str, options: dict[str, Any]) -> Arm:
    modules = list(attention_modules(model).values())
    cache = DynamicCache(config=model.config)
    look = {"bar_format": "{desc} {bar:40} {elapsed}", "ncols": 78, "disable": None}  # None: only on a terminal
    with tqdm(total=len(modules) + NEW_TOKENS, desc=f"{name:6} reads ", **look) as bar:
        start = time.perf_counter()
        with _counting(modules, bar):
            nll = token_nll(model, input_ids, past_key_values=cache)[0].cpu()
        seconds = time.perf_counter() - start
        bar.set_description_str(f"{name:6} writes")
        # The cache holds all tokens but the last, so the text is not read again.
        text = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=_Count(bar),
        )
        bar.update(len(modules) + NEW_TOKENS - bar.n)  # it may have ended its text early
    states = [state_of(module) for module in modules]
    dense = BlockSparseSpec.of([DENSE] * model.config.num_attention_heads)
    specs = [dense if state is None or state.spec is None else state.spec for state in states]
    density = sum(spec.density(input_ids.shape[1]) for spec in specs) / len(specs)
    continuation = tokenizer.decode(text[0, input_ids.shape[1] :], skip_special_tokens=True)
    return Arm(name, options, specs[0], density, nll, seconds, continuation)


@contextmanager
def _counting(modules: Sequence[nn.Module], bar: tqdm) -> Iterator[None]:
    """Move `bar` on with every layer that has read the text."""

    def step(module: nn.Module, args: Any, output: Any) -> None:
        if output[0].shape[1] > 1:  # scoring calls the model on single tokens
            bar.update()

    handles = [module.register_forward_hook(step) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Count(BaseStreamer):
    """Move a bar on with every new token."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def put(self, value: Tensor) -> None:
        if value.numel() == 1:  # not the prompt, which comes first
            self._bar.update()

    def end(self) -> None:
        pass
