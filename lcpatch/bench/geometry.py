"""A model of known geometry and random weights: speed and memory do not depend on what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072 + 4096,
}
"""Llama-3.1-8B."""

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
"""What a test runs on a CPU."""


def random_llama(geometry: dict[str, Any], device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of `geometry` in eval mode, with SDPA attention and no end-of-sequence token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**geometry, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


@contextmanager
def two_layers(model: nn.Module) -> Iterator[None]:
    """For a while a Llama of two layers: compiles, and makes cuDNN's plans, for the shapes that are timed next.

    The last one's attention is not run where nothing reads it.
    """
    decoder, config = model.model, model.config
    layers, count = decoder.layers, config.num_hidden_layers
    decoder.layers, config.num_hidden_layers = layers[:2], 2
    try:
        yield
    finally:
        decoder.layers, config.num_hidden_layers = layers, count
