"""Caches on disk: read a long prefix once, continue it in any later process.

One safetensors file: the tensors of every layer, and a JSON header in its metadata that says which cache of which model
this is. Loading maps the file into memory and copies layer by layer to where each is computed. A file is untrusted: its
header is measured, every name, type and shape in it is checked, and nothing in it chooses code to run.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..core.errors import LcpatchError, StoreError
from ..hf.layers import head_dim_of, num_kv_heads_of
from ..hf.models import attention_modules, unwrap, weights_of
from .budget import is_integer
from .cache import LongCache, caches
from .identity import identity_of, tokenizer_identity
from .untrusted import fitting, size, whole

FORMAT = 1
"""Version of the header. A reader refuses a newer one."""

KEY = "lcpatch_cache"
ATTEMPTS = 100  # to open a file that is being replaced; each takes as long as a rename, so the second succeeds
MAX_HEADER = 1 << 20  # kilobytes are usual; JSON takes up to 50 times its size in memory

DIFFERS = {
    "class": "another kind of model",
    "config": "another geometry",
    "rope": "other positions (RoPE)",
    "patch": "another patch",
    "dtype": "another dtype",
    "weights": "other weights",
}


def save_cache(cache: LongCache, path: str | Path, tokenizer: Any = None) -> Path:
    """Write `cache` to `path`, whole or not at all; see `LongCache.save`."""
    path = Path(path)
    if path.is_dir():
        raise StoreError(f"{path} is a folder; give a file, such as {path / 'prefix.safetensors'}")
    model = cache.model()
    if model is None:
        raise StoreError("the model that this cache was made for is gone; save a cache while its model is there")
    cache.check_whole()
    tensors, layers = {}, []
    for index, layer in enumerate(cache.layers):
        held, numbers = _state(layer, index)
        layers.append({"kind": type(layer).__name__, "numbers": numbers})
        tensors |= {f"{index}.{name}": x.detach().to("cpu").contiguous() for name, x in held.items()}
    from .. import __version__

    header = {
        "format": FORMAT,
        "cache": cache.name,
        "options": _json({k: v for k, v in cache.options().items() if k not in cache.places}, cache.name),
        "model": {**identity_of(model), "name": getattr(unwrap(model).config, "_name_or_path", "")},
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
        "versions": {"lcpatch": __version__, "transformers": transformers_version, "torch": torch.__version__},
        "layers": layers,
    }
    _write(tensors, {KEY: json.dumps(header)}, path)
    return path


def load_cache(path: str | Path, model: nn.Module, tokenizer: Any = None, **places: Any) -> LongCache:
    """The cache that `cache.save(path)` wrote, ready to go on: `model.generate(**inputs, past_key_values=cache)`.

    The inputs are the whole text, the saved prefix in front, as in any later turn. Continuing gives what continuing
    the saved cache gives, to the bit.

    Args:
        path: the file.
        model: the model that the cache was made for, or its equal: geometry, RoPE, patch, dtype and weights are
            compared.
        tokenizer: if given, and one was when saving, it must be equal too.
        **places: where this machine keeps it: `disk` and `host_bytes` of a tiered cache, which no file brings.

    Raises:
        StoreError: no such file, a broken or unknown one, or a cache of another model.
    """
    path = Path(path)
    with _reading(path) as file:
        header = _header(file, path)
        _compare(header, model, tokenizer, path)
        cache = _empty(header, model, path, places)
        _fill(cache, header["layers"], file, model, path)
    return cache


def read_header(path: str | Path) -> dict[str, Any]:
    """What the file says about its cache and the model: its kinds checked, its values not; no model is needed.

    Raises:
        StoreError: no such file, or one that holds no cache of ours.
    """
    path = Path(path)
    with _reading(path) as file:
        return _header(file, path)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The file, open for reading.

    Raises:
        StoreError: no such file, or a broken one.
    """
    try:
        with _opened(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = "there is no such file" if not path.exists() else f"not a safetensors file, or cut off ({error})"
        raise StoreError(f"{path}: {reason}") from error


def _opened(path: Path) -> Any:
    """The file, open for reading: one file, though a writer may replace it meanwhile.

    safetensors opens a path twice, for the header and for the data, which then may belong to two different files.
    """
    for _ in range(ATTEMPTS):
        before = _stamp(path)
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except RuntimeError:  # torch: the second file is smaller than the first
            if _stamp(path) == before:
                raise
            continue
        if _stamp(path) == before:
            return file
    raise StoreError(f"{path} is replaced by others all the time; try again")


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells a file from the one that takes its place."""
    held = os.stat(path)
    return held.st_ino, held.st_mtime_ns, held.st_size


def _state(layer: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A layer's tensors and numbers; None for one that holds nothing yet."""
    if not getattr(layer, "is_initialized", True):  # linear attention has another name for it
        return {}, None
    if hasattr(layer, "state"):
        return layer.state()
    if type(layer) is DynamicSlidingWindowLayer:
        return {"keys": layer.keys, "values": layer.values}, {"cumulative_length": layer.cumulative_length}
    raise StoreError(f"layer {index} is a {type(layer).__name__}, which cannot be saved")


def _json(options: dict[str, Any], name: str) -> dict[str, Any]:
    options = {key: int(value) if is_integer(value) else value for key, value in options.items()}  # numpy's too
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(x, (str, int, float, bool, type(None))) for x in values):
            raise StoreError(f"{name} cache: the option {key}={value!r} cannot be written to a file")
    return options


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write beside `path`, then rename: who reads meanwhile gets the old file or the new one, never half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # of any new file: safetensors' own is for no one else to read
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # a rename must not reach the disk before what it names
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} could not be written, what was there is untouched: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _header(file: Any, path: Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise StoreError(f"{path} holds no cache of lcpatch's: `cache.save(path)` writes one")
    if len(text) > MAX_HEADER:
        raise StoreError(f"{path}: its header is larger than {MAX_HEADER} bytes: refused")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise StoreError(f"{path}: its header is not one that `cache.save` writes")
    if not 1 <= header["format"] <= FORMAT:
        raise StoreError(
            f"{path} has format {header['format']}; this lcpatch reads up to {FORMAT}: pip install -U lcpatch"
        )
    kinds = {"cache": str, "options": dict, "model": dict, "layers": list}
    for name, kind in kinds.items():
        if not isinstance(header.get(name), kind):
            raise StoreError(f"{path}: {name!r} is missing from its header, or is no {kind.__name__}")
    return header


def _compare(header: dict[str, Any], model: nn.Module, tokenizer: Any, path: Path) -> None:
    saved, now = header["model"], identity_of(model)
    wrong = [
        f"{what} ({str(saved.get(key))[:80]}, here {str(now[key])[:80]})"
        for key, what in DIFFERS.items()
        if saved.get(key) != now[key]
    ]
    if wrong:
        name = saved.get("name") or saved.get("class")
        raise StoreError(f"{path} was saved with {name}, and this model has {'; '.join(wrong)}: its keys do not fit")
    if tokenizer is not None and header.get("tokenizer") not in (None, tokenizer_identity(tokenizer)):
        raise StoreError(f"{path} was saved with another tokenizer: its tokens mean something else")


def _empty(header: dict[str, Any], model: nn.Module, path: Path, places: dict[str, Any]) -> LongCache:
    kind = caches.get(header["cache"])
    if wrong := places.keys() - set(kind.places):
        known = ", ".join(kind.places) or "none"
        raise ValueError(f"load_cache: {sorted(wrong)} cannot be chosen for a {kind.name} cache, only: {known}")
    if foreign := header["options"].keys() & set(kind.places):
        raise StoreError(f"{path}: {sorted(foreign)} are for this machine to choose: load_cache(path, model, disk=…)")
    try:
        return kind(model, **header["options"], **places)
    except LcpatchError:
        raise
    except (TypeError, ValueError) as error:  # an option that the class does not have, or a value that it refuses
        raise StoreError(f"{path}: {header['cache']} cache: {error}") from error


def _fill(cache: LongCache, entries: list[Any], file: Any, model: nn.Module, path: Path) -> None:
    if len(entries) != len(cache.layers):
        raise StoreError(f"{path} holds {len(entries)} layers, the model has {len(cache.layers)}")
    names: dict[int, list[str]] = {}
    for name in file.keys():  # noqa: SIM118 a file of safetensors is no dictionary
        index, _, rest = name.partition(".")
        if not rest or not index.isdigit() or int(index) >= len(entries):
            raise StoreError(f"{path}: unknown tensor {name!r}")
        names.setdefault(int(index), []).append(rest)
    modules = attention_modules(unwrap(model))
    for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
        if not isinstance(entry, dict) or entry.get("kind") != type(layer).__name__:
            raise StoreError(f"{path}: layer {index} is not the {type(layer).__name__} that this cache has there")
        numbers = entry.get("numbers")
        if numbers is None:
            continue
        tensors = {rest: file.get_tensor(f"{index}.{rest}") for rest in names.get(index, [])}
        try:
            if not isinstance(numbers, dict):
                raise ValueError("its numbers are no JSON object")
            _load(layer, tensors, numbers, _like(modules[index], model))
        except (KeyError, ValueError) as error:
            raise StoreError(f"{path}: layer {index}: {error}") from error
    seen = {layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)}
    if len(seen) > 1:
        raise StoreError(f"{path}: its layers have seen different numbers of tokens: {sorted(seen)}")


def _load(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
    if hasattr(layer, "load_state"):
        layer.load_state(tensors, numbers, like)
        return
    length = whole(numbers, "cumulative_length")
    found = fitting(tensors, {"keys": like, "values": like}, size(tensors, "keys", 0), None)
    layer.lazy_initialization(found["keys"], found["values"])
    layer.cumulative_length = length
    # Where steps were recorded (assisted decoding) it holds more than its window, which only such a layer leaves out.
    layer.keys, layer.values = (found[name][:, :, -layer.sliding_window + 1 :] for name in ("keys", "values"))


def _like(module: nn.Module, model: nn.Module) -> Tensor:
    """An empty tensor [1, K, 0, D] as the layer's keys will be: heads, size, dtype and device."""
    heads, head_dim = num_kv_heads_of(module.config, module.layer_idx), head_dim_of(module)
    device = next((x.device for x in weights_of(module) if not x.is_meta), torch.device("cpu"))
    return torch.empty(1, heads, 0, head_dim, dtype=unwrap(model).dtype, device=device)
