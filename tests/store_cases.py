"""Caches in files: one to save, what comes after it, and a file with something in it changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from cache_cases import feed, left_padding, make, make_model
from models import tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcpatch.caches.prefix_file import CHECKSUM, KEY, metadata_of

LENGTH = 110
PADS = [0, 37]
CODEC = {"codec": "int8"}
LOSSY = {"offload": True, **CODEC}
DENSE = {"dense_layers": 1}


def saved(
    name: str, folder: Path, small: bool = True, model: Any = None, **options: Any
) -> tuple[Path, Any, Any, tuple[Tensor, Tensor]]:
    """A file, the cache that it holds, its model, and the text that it is of, which goes on."""
    model = make_model(name) if model is None else model
    ids, mask = tokens(2, LENGTH), left_padding(PADS, LENGTH)
    cache = make(name, model, small, **options)
    feed(model, ids[:, :80], cache, [60, 1, 1, 18], mask[:, :80])
    return cache.save(folder / "prefix.safetensors"), cache, model, (ids, mask)


def continued(model: nn.Module, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of chunks and tokens after the first 80."""
    positions, logits = (mask.cumsum(-1) - 1).clamp(min=0), []
    with torch.no_grad():
        for start, end in [(80, 81), (81, 82), (82, 100), *[(n, n + 1) for n in range(100, LENGTH)]]:
            now = slice(start, end)
            padding = {"attention_mask": mask[:, :end], "position_ids": positions[:, now]}
            logits.append(model(ids[:, now], past_key_values=cache, **padding).logits)
    return torch.cat(logits, 1)


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def rewritten(
    path: Path, change: Callable[[dict[str, Any]], Any] | None = None, tensors: Callable[..., Any] | None = None
) -> Path:
    """The file with its header, or its tensors, changed by someone who makes the checksums fit.

    Args:
        path: of the file.
        change: of the header, which becomes anything that JSON can say, or a text that need not be JSON.
        tensors: of the tensors.
    """
    header, held = header_of(path), load_file(path)
    header = change(header) if change else header
    held = tensors(held) if tensors else held
    if isinstance(header, dict):
        metadata = metadata_of(held, {k: v for k, v in header.items() if k != "checksums"})
    else:
        text = header if isinstance(header, str) else json.dumps(header)
        metadata = {KEY: text, CHECKSUM: f"{crc32(text.encode()):08x}"}
    save_file(held, path.with_name("changed"), metadata=metadata)
    return path.with_name("changed")
