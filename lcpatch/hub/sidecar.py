"""The two files that lcpatch adds to a saved model: the patch as JSON, and its learnable sinks.

A file from the Hub is untrusted: it is measured before it is read, and what is not expected in it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.config import SPECS, PatchConfig

CONFIG_FILE = "lcpatch_config.json"
SINKS_FILE = "lcpatch.safetensors"
FORMAT = 1
"""Version of `lcpatch_config.json`. A reader refuses a newer one."""

POSITIONS = ("max_position_embeddings", "rope_parameters")
"""Settings of the base model's config that training for a longer context changes."""

MAX_CONFIG_BYTES = 64 * 2**10
HEADER_BYTES = 2**20  # more than the header of a file of sinks needs


def write_config(folder: Path, patch: PatchConfig, positions: Mapping[str, Any] | None = None) -> None:
    """Write `lcpatch_config.json`; `positions` are the settings of `POSITIONS`, for which an adapter has no place."""
    from .. import __version__

    data = {"format": FORMAT, "lcpatch_version": __version__, "patch": patch.to_dict()}
    if positions:
        data["positions"] = dict(positions)
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> PatchConfig | None:
    """The patch in `lcpatch_config.json`, or None if there is no such file.

    Raises:
        ValueError: a file that is too large, not valid JSON, of a newer format, or with anything unexpected in it.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    data = read_json(file)
    version = data.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(f"{CONFIG_FILE}: format={version!r} must be a whole number from 1 to {FORMAT}")
    if version > FORMAT:
        raise ValueError(
            f"{CONFIG_FILE} has format {version}; this lcpatch reads up to {FORMAT}: pip install -U lcpatch"
        )
    if unknown := sorted(set(data) - {"format", "lcpatch_version", "patch", "positions"}):
        raise ValueError(f"{CONFIG_FILE}: unknown key {unknown[0]!r}; keys: format, lcpatch_version, patch, positions")
    if not isinstance(data.get("lcpatch_version", ""), str):
        raise ValueError(f"{CONFIG_FILE}: lcpatch_version must be a string")
    return read_patch(data.get("patch"), CONFIG_FILE)


def read_positions(folder: Path) -> dict[str, Any]:
    """The settings of `POSITIONS` in `lcpatch_config.json`; empty if there are none.

    Raises:
        ValueError: anything that is not a number of positions or a table of plain values.
    """
    file = folder / CONFIG_FILE
    data = read_json(file).get("positions", {}) if file.is_file() else {}
    if not isinstance(data, dict) or data.keys() - set(POSITIONS):
        raise ValueError(f"{CONFIG_FILE}: positions must hold {' and '.join(POSITIONS)} only, not {str(data)[:80]}")
    limit, rope = data.get("max_position_embeddings", 1), data.get("rope_parameters", {})
    if type(limit) is not int or limit < 1:
        raise ValueError(f"{CONFIG_FILE}: max_position_embeddings={limit!r} must be a whole number from 1 on")
    if not isinstance(rope, dict) or not all(map(_plain, rope.values())):
        raise ValueError(f"{CONFIG_FILE}: rope_parameters must be numbers and names, one table a kind of layer at most")
    return data


def _plain(value: Any, nested: bool = True) -> bool:
    if isinstance(value, dict):
        return nested and all(_plain(item, nested=False) for item in value.values())
    if isinstance(value, list):
        return all(isinstance(item, (int, float)) for item in value)
    return isinstance(value, (int, float, str, bool, type(None)))


def read_patch(data: Any, source: str) -> PatchConfig:
    """The patch that untrusted JSON describes.

    Args:
        data: the JSON value.
        source: where it comes from, for messages.

    Raises:
        ValueError: not a patch, or one that would make transformers download and run code.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{source}: the patch must be a JSON object, not {type(data).__name__}")
    if type(data.get("format", 1)) is not int:
        raise ValueError(f"{source}: the patch's format={data['format']!r} must be a whole number")
    for name in ("mode", "sinks", "dense"):
        if not isinstance(data.get(name), str | None):
            raise ValueError(f"{source}: {name}={data[name]!r} must be a string")
    specs = data.get(SPECS, {})
    if not isinstance(specs, Mapping) or not all(isinstance(spec, str) for spec in specs.values()):
        raise ValueError(f"{source}: {SPECS} must be an object of strings, one a layer")
    if "/" in (data.get("dense") or ""):
        raise ValueError(
            f"{source}: dense={data['dense']!r} is a kernel from the Hub, which a file may not choose; name it "
            "yourself: from_pretrained(…, attn_implementation=…)"
        )
    try:
        return PatchConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_json(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: too large, or not a JSON object.
    """
    with file.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"{file.name} is larger than {max_bytes} bytes: refused")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file.name} must hold a JSON object, not {type(data).__name__}")
    return data


def write_sinks(folder: Path, sinks: Mapping[str, Tensor]) -> None:
    """Write the learnable sinks by name (see `hf.sinks`); without any, remove what an earlier save left."""
    file = folder / SINKS_FILE
    if not sinks:
        file.unlink(missing_ok=True)
        return
    tensors = {name: sink.detach().cpu().contiguous() for name, sink in sinks.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def read_sinks(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The learnable sinks of the names in `shapes`, which says what shape each has.

    Raises:
        ValueError: a missing, broken or oversized file, or one that holds anything else.
    """
    file = folder / SINKS_FILE
    if not file.is_file():
        raise ValueError(
            f"the patch has learnable sinks, but there is no {SINKS_FILE}: save with lcpatch.save_pretrained"
        )
    limit = HEADER_BYTES + 4 * sum(map(math.prod, shapes.values()))
    if file.stat().st_size > limit:
        raise ValueError(f"{SINKS_FILE} is larger than {limit} bytes, more than this patch's sinks need")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{SINKS_FILE} is not a valid safetensors file: {error}") from error
    if differing := sorted(tensors.keys() ^ shapes.keys()):
        raise ValueError(f"{SINKS_FILE} must hold exactly the sinks of this patch, which {differing[0]} tells apart")
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape or found.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{SINKS_FILE}: {name} must hold floating-point numbers of shape {list(shape)}")
    return tensors
