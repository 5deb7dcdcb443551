"""From what a user asks for to what each layer gets: method, options, layers, mode. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

from ..core.config import PatchConfig
from ..core.errors import UnsupportedModelError
from ..hf.models import full_attention_layers, why_no_full_attention
from ..patterns import AttentionPattern, patterns

Layers = Iterable[int] | str | Callable[[int], bool] | None


def config_of(method: object, settings: Mapping[str, Any]) -> PatchConfig:
    """The `PatchConfig` that a method argument and keyword settings mean.

    Args:
        method: a registered name, a pattern, a `PatchConfig`, a dict in its form, or the path of a YAML or JSON file.
        settings: `layers`, `mode`, `sinks` override the method's own; everything else is an option of the pattern.

    Raises:
        UnknownNameError, ValueError, FileNotFoundError: what does not exist or does not fit.
    """
    ours = {k: v for k, v in settings.items() if k in ("layers", "mode", "sinks") and v is not None}
    options = {k: v for k, v in settings.items() if k not in ("layers", "mode", "sinks")}
    if isinstance(method, AttentionPattern):
        if options:
            raise ValueError(f"options {sorted(options)} belong into the pattern itself: {type(method).__name__}(…)")
        base = PatchConfig(method.name, method.to_options())
    elif isinstance(method, PatchConfig):
        base = method
    elif isinstance(method, Mapping):
        base = PatchConfig.from_dict(method)
    elif isinstance(method, (str, Path)) and Path(method).suffix in (".yaml", ".yml", ".json"):
        base = PatchConfig.from_file(method)
    elif isinstance(method, str):
        base = PatchConfig(method)
    else:
        raise ValueError(f"{method!r} is not a method name, a pattern, a dict or a .yaml/.json file")
    if options:
        base = replace(base, options={**base.options, **options})
    return replace(base, **ours)


def pattern_of(config: PatchConfig) -> AttentionPattern:
    """The pattern that `config` describes."""
    return patterns.get(config.method).from_options(dict(config.options))


def sparse_layers(layers: Layers, config: Any, indices: list[int]) -> list[int]:
    """The layers to patch.

    Args:
        layers: indices, "every_N" (layers 0, N, 2 N, …), a function of the index, or None for all.
        config: the model's config.
        indices: the model's attention layers.

    Raises:
        UnsupportedModelError: the model has no full-attention layer.
        ValueError: an unknown layer, or one that has a window of its own.
    """
    full = full_attention_layers(config, indices)
    if not full:
        raise UnsupportedModelError(why_no_full_attention(config))
    if layers is None:
        return full
    if isinstance(layers, str):
        prefix, _, step = layers.partition("_")
        if prefix != "every" or not step.isdigit() or int(step) < 1:
            raise ValueError(f"layers={layers!r} must be 'every_N' with N >= 1, a list of indices, a function or None")
        chosen = [n for n in full if n % int(step) == 0]
    elif callable(layers):
        chosen = [n for n in full if layers(n)]
    else:
        chosen = _indices(layers)
        if unknown := [n for n in chosen if n not in indices]:
            raise ValueError(
                f"layers: there is no layer {unknown[0]}; this model has layers {indices[0]} to {indices[-1]}"
            )
        if windowed := [n for n in chosen if n not in full]:
            raise ValueError(f"layers: layer {windowed[0]} attends within a window; full-attention layers: {full}")
    if not chosen:
        raise ValueError(f"layers={layers!r} selects none of the full-attention layers {full}")
    return chosen


def _indices(layers: object) -> list[int]:
    try:
        return sorted({index(n) for n in layers})  # numpy's integers are as good as Python's
    except TypeError as error:
        raise ValueError(f"layers={layers!r} must be a list of layer indices, 'every_N', a function or None") from error
