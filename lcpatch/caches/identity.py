"""What makes a model the one whose keys and values a saved cache holds: its geometry, its positions, its weights.

Two models with one config but other weights give other keys, so a few weights of every parameter are looked at too:
16 values of each tell fine-tunes and adapters apart, and cost milliseconds. So do those that quantised layers keep
outside of parameters.
"""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..core.config import SPECS
from ..hf.models import unwrap
from .held import tensors_in

GEOMETRY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "attention_multiplier",
    "query_pre_attn_scalar",
)
"""Fields of a config that say what keys and values are; the rest may differ between versions of transformers."""

SAMPLE = 16  # values of each parameter


def identity_of(model: nn.Module) -> dict[str, Any]:
    """JSON that equals another model's only if both compute the same keys and values, as far as can be told."""
    base = unwrap(model)
    config = base.config
    geometry = {name: getattr(config, name, None) for name in GEOMETRY}
    return {
        "class": type(base).__name__,
        "config": _digest(json.dumps(geometry, sort_keys=True, default=str).encode()),
        "rope": json.loads(json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str)),
        "patch": _patch(getattr(config, "lcpatch", None)),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights": _weights(base),
    }


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """The same for a tokenizer: its class and its vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {"class": type(tokenizer).__name__, "vocabulary": _digest(json.dumps(vocabulary).encode())}


@torch.no_grad()
def _weights(base: nn.Module) -> str:
    digest = hashlib.sha256()
    packed = ((name, x) for name, x in base.state_dict(keep_vars=True).items() if not isinstance(x, nn.Parameter))
    for name, weight in chain(base.named_parameters(), packed):
        digest.update(name.encode())
        for x in tensors_in(weight):
            if not x.is_meta:  # offloaded to disk: only its name counts
                sample = x.detach().flatten()[:: max(x.numel() // SAMPLE, 1)][:SAMPLE]
                digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _patch(carried: Any) -> Any:
    """The patch itself: what its options come to, and the version of its form, follow from lcpatch."""
    if isinstance(carried, dict):
        carried = {key: value for key, value in carried.items() if key not in ("format", SPECS)}
    return json.loads(json.dumps(carried, sort_keys=True, default=str))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
