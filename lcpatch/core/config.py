"""`PatchConfig`: a patch as plain data. It is what `config.json` carries and what a YAML file says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

FORMAT = 2
"""Version of the dictionary below. A reader refuses a newer one and takes an older one as it is: 1 had no `specs`."""

SPECS = "specs"
"""Beside the patch, a model's config says what each sparse layer's pattern comes to: by layer index, the integers of
`BlockSparseSpec.to_ints`, separated by spaces. It is for readers that know no patterns, such as the kernels on the Hub.
A reader that knows them leaves it aside."""

MAX_PREFIX = 256
"""Prefix sinks of a layer: far more than papers use (1 to 8), and few enough that a file may ask for them."""

SINKS: dict[str, dict[str, float]] = {
    "tokens": {"count": 4},
    "logit": {"start": -15.0},
    "prefix": {"count": 4, "start": -8.0},
}
"""Kinds of sinks, and the numbers that may follow a kind's name, in order, with their defaults."""

Mode = Literal["train", "always", "never"]


@dataclass(frozen=True)
class PatchConfig:
    """Which method a model is patched with, where, and when it is active.

    Args:
        method: registered name of the pattern ("s2", "shift", "sf", "sink").
        options: the pattern's own options, as JSON values.
        layers: indices of the patched layers; or "every_2"; None for every full-attention layer.
        mode: "train": sparse while `module.training`, dense otherwise; "always"; "never"; None: the method's default.
        sinks: None, "tokens" or "tokens:8" (the first 4 or 8 real tokens stay visible to every row), "logit" or
            "logit:-15" (a learnable logit per query head, starting at that value), "prefix", "prefix:4" or
            "prefix:4:-8" (4 learnable keys and values per KV head, whose logits start at that value).
        dense: the attention implementation of layers and phases that stay dense; None: the model's own.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | str | None = None
    mode: Mode | None = None
    sinks: str | None = None
    dense: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is not one of {', '.join(map(repr, get_args(Mode)))}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options={self.options!r} must be a mapping of option names to values")
        if self.dense is not None and not isinstance(self.dense, str):
            raise ValueError(f"dense={self.dense!r} must be the name of an attention implementation")
        parse_sinks(self.sinks)
        if self.layers is None or isinstance(self.layers, str):
            return
        layers = tuple(self.layers) if isinstance(self.layers, Iterable) else ()
        if not layers or not all(type(n) is int and n >= 0 for n in layers):
            raise ValueError(f"layers={self.layers!r} must be a non-empty list of layer indices (0, 1, …)")
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    @property
    def has_learnable_sinks(self) -> bool:
        """Whether the patch adds parameters to the model, which no plain loader brings back."""
        sinks = parse_sinks(self.sinks)
        return sinks is not None and sinks.learnable

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the format's version first; what is None is left out."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given["options"] = dict(self.options)
        if isinstance(self.layers, tuple):
            given["layers"] = list(self.layers)
        return {"format": FORMAT, **{k: v for k, v in given.items() if v is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PatchConfig:
        """Inverse of `to_dict`; `format` may be missing (a hand-written file), and `specs` is left aside.

        Raises:
            ValueError: a newer format, an unknown key, or a missing method.
        """
        given = {k: v for k, v in data.items() if k != SPECS}
        version = given.pop("format", FORMAT)
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise ValueError(
                f"this patch has format {version!r}; this lcpatch reads formats 1 to {FORMAT}: pip install -U lcpatch"
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"unknown key {unknown[0]!r} in a patch; keys: format, {', '.join(sorted(known))}")
        if not isinstance(given.get("method"), str):
            raise ValueError("a patch needs `method`, the name of a registered pattern, such as 's2'")
        if isinstance(given.get("layers"), list):
            given["layers"] = tuple(given["layers"])
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> PatchConfig:
        """Read a `.yaml`, `.yml` or `.json` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, or not a patch.
        """
        import yaml  # only here: a patch is rarely read from a file

        path = Path(path)
        text = path.read_text(encoding="utf-8")
        try:
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} must hold a mapping with `method` and options, not {type(data).__name__}")
        return cls.from_dict(data)


class Sinks(NamedTuple):
    """What a `sinks` setting says.

    Args:
        kind: "tokens", "logit" or "prefix".
        count: tokens, or prefix sinks.
        start: of the learnable logits.
    """

    kind: str
    count: int = 1
    start: float = 0.0

    @property
    def learnable(self) -> bool:
        """Whether they are parameters of the model."""
        return self.kind in ("logit", "prefix")


def parse_sinks(sinks: str | None) -> Sinks | None:
    """A `sinks` setting, read; the logit of a prefix sink starts higher than a sink logit, see `lcpatch.apply`.

    Raises:
        ValueError: none of the forms that there are.
    """
    if sinks is None:
        return None
    kind, *values = str(sinks).split(":")
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [math.nan]
    given = SINKS.get(kind, {}) | dict(zip(SINKS.get(kind, ()), numbers, strict=False))
    count = given.get("count", 1)
    known = kind in SINKS and len(numbers) <= len(SINKS[kind]) and all(map(math.isfinite, numbers))
    if not known or count < 1 or count % 1 or (kind == "prefix" and count > MAX_PREFIX):
        raise ValueError(
            f"sinks={sinks!r} must be 'tokens', 'tokens:N' (N >= 1), 'logit', 'logit:START', 'prefix', 'prefix:N' "
            f"(N from 1 to {MAX_PREFIX}) or 'prefix:N:START'"
        )
    return Sinks(kind, int(count), given.get("start", 0.0))
