"""What only the model's maker knows, for its card: licence, data, training, limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

MAX_BYTES = 256 * 2**10
RELATIONS = ("adapter", "finetune", "merge", "quantized")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
WORD = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True)
class About:
    """Args:
    base_model: the Hub's name of the model that this one was made from; default: what the model itself says.
    base_model_relation: "adapter", "finetune", "merge" or "quantized"; default: adapter or finetune.
    license: the Hub's short name of a licence, such as "apache-2.0".
    language: codes, such as ["en"].
    datasets: names on the Hub.
    tags: more of them.
    training: how it was trained: a text, or a mapping of settings.
    limits: more of them, a sentence each.
    citation: more BibTeX.
    """

    base_model: str | None = None
    base_model_relation: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    training: str | Mapping[str, Any] | None = None
    limits: tuple[str, ...] = ()
    citation: str | None = None

    def __post_init__(self) -> None:
        for name in ("language", "datasets", "tags", "limits"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else given
            if not isinstance(given, (list, tuple)) or not all(isinstance(x, str) for x in given):
                raise ValueError(f"{name}={given!r} must be a list of strings")
            object.__setattr__(self, name, tuple(given))
        for name in ("base_model", "base_model_relation", "license", "citation"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a string")
        self._match("base_model", [self.base_model], HUB_ID, "a name on the Hub, such as 'org/model'")
        self._match("datasets", self.datasets, HUB_ID, "names on the Hub, such as 'org/data'")
        self._match("license", [self.license], WORD, "the Hub's name of a licence, such as 'apache-2.0'")
        self._match("language", self.language, WORD, "codes of languages, such as 'en'")
        if self.base_model_relation not in (None, *RELATIONS):
            raise ValueError(f"base_model_relation={self.base_model_relation!r} is not one of {', '.join(RELATIONS)}")
        if not isinstance(self.training, str | Mapping | None):
            raise ValueError(f"training={self.training!r} must be a text or a mapping of settings")

    @classmethod
    def of(cls, given: About | Mapping[str, Any] | str | Path | None) -> About:
        """From a mapping, or a YAML or JSON file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an unknown key, or a value that does not fit.
        """
        if given is None or isinstance(given, About):
            return given or cls()
        data = given if isinstance(given, Mapping) else _read(Path(given))
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in data if name not in known]:
            raise ValueError(f"a card knows nothing of {unknown[0]!r}; it takes: {', '.join(known)}")
        return cls(**data)

    def _match(self, name: str, values: Any, form: re.Pattern[str], rule: str) -> None:
        for value in values:
            if value is not None and not form.fullmatch(value):
                raise ValueError(f"{name}={value!r} must be {rule}")


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes")
    try:
        data = json.loads(raw) if path.suffix == ".json" else yaml.safe_load(raw)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper() or 'YAML'}: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must hold a mapping, not {type(data).__name__}")
    return data
