"""Caches on disk: read a long prefix once, continue it in any later process.

One safetensors file (`prefix_file`): the tensors of every layer, and a header that says which cache of which model this
is. Loading maps the file into memory and copies layer by layer to where each is computed. A file is untrusted: its
header is measured, every name, type and shape in it is checked, and nothing in it chooses code to run.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..core.errors import LcpatchError, StoreError
from ..hf.layers import head_dim_of, num_kv_heads_of
from ..hf.models import attention_modules, unwrap, weights_of
from .budget import is_integer
from .cache import LongCache, caches
from .identity import identity_of, tokenizer_identity
from .prefix_file import PrefixFile, reading, write
from .untrusted import fitting, size, whole

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
        "cache": cache.name,
        "options": _json({k: v for k, v in cache.options().items() if k not in cache.places}, cache.name),
        "model": {**identity_of(model), "name": getattr(unwrap(model).config, "_name_or_path", "")},
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
        "versions": {"lcpatch": __version__, "transformers": transformers_version, "torch": torch.__version__},
        "layers": layers,
    }
    write(tensors, header, path)
    return path


def load_cache(
    path: str | Path, model: nn.Module, tokenizer: Any = None, verify: bool = True, **places: Any
) -> LongCache:
    """The cache that `cache.save(path)` wrote, ready to go on: `model.generate(**inputs, past_key_values=cache)`.

    The inputs are the whole text, the saved prefix in front, as in any later turn. Continuing gives what continuing
    the saved cache gives, to the bit.

    Args:
        path: the file.
        model: the model that the cache was made for, or its equal: geometry, RoPE, patch, dtype and weights are
            compared.
        tokenizer: if given, and one was when saving, it must be equal too.
        verify: compare the checksums of all tensors, so that a file which was damaged since it was saved is refused;
            the header's is compared in any case.
        **places: where this machine keeps it: `disk` and `host_bytes` of a tiered cache, which no file brings.

    Raises:
        StoreError: no such file, a broken or unknown one, or a cache of another model.
    """
    with reading(Path(path)) as file:
        _compare(file, model, tokenizer)
        cache = _empty(file, model, places)
        if verify and file.checksums is None:
            warnings.warn(f"{path} is of a format without checksums: what it holds is not verified", stacklevel=3)
        _fill(cache, file, model, verify)
    return cache


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


def _compare(file: PrefixFile, model: nn.Module, tokenizer: Any) -> None:
    saved, now, path = file.header["model"], identity_of(model), file.path
    wrong = [
        f"{what} ({str(saved.get(key))[:80]}, here {str(now[key])[:80]})"
        for key, what in DIFFERS.items()
        if saved.get(key) != now[key]
    ]
    if wrong:
        name = saved.get("name") or saved.get("class")
        raise StoreError(f"{path} was saved with {name}, and this model has {'; '.join(wrong)}: its keys do not fit")
    if tokenizer is not None and file.header.get("tokenizer") not in (None, tokenizer_identity(tokenizer)):
        raise StoreError(f"{path} was saved with another tokenizer: its tokens mean something else")


def _empty(file: PrefixFile, model: nn.Module, places: dict[str, Any]) -> LongCache:
    header, path = file.header, file.path
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


def _fill(cache: LongCache, file: PrefixFile, model: nn.Module, verify: bool) -> None:
    entries, path = file.header["layers"], file.path
    if len(entries) != len(cache.layers):
        raise StoreError(f"{path} holds {len(entries)} layers, the model has {len(cache.layers)}")
    names: dict[int, list[str]] = {}
    for name in file.names():
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
        tensors = {rest: file.tensor(f"{index}.{rest}", verify) for rest in names.get(index, [])}
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
