"""Config objects of a model's own: what we write into a config must not reach another model that shares it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .registration import NAME


@dataclass
class Snapshot:
    """A config's attributes at one time, and what its containers held."""

    attributes: dict[str, Any]
    contents: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> Snapshot:
        containers = {k: v for k, v in config.__dict__.items() if isinstance(v, (dict, list, set))}
        return cls(dict(config.__dict__), copy.deepcopy(containers))

    def carry_changes(self, config: Any, target: Any) -> None:
        """Do to `target` what was done to `config` since."""
        for name, value in config.__dict__.items():
            known = name in self.attributes and self.attributes[name] is value
            if not known or (name in self.contents and self.contents[name] != value):
                target.__dict__[name] = value
        for name in self.attributes.keys() - config.__dict__.keys():
            target.__dict__.pop(name, None)


@dataclass
class OwnConfigs:
    """The config objects that a model had, and the copies that it has instead while our name is in them.

    Args:
        originals: the model's config objects before, the main one first; they are never changed.
        copies: the copies in use, in the same order.
        snapshots: the copies' contents right after: what differs later, the user changed.
    """

    originals: list[Any] = field(default_factory=list)
    copies: list[Any] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    @classmethod
    def take(cls, model: nn.Module, base: Any, settings: dict[str, Any]) -> OwnConfigs:
        """Give the model copies of its config objects, with `settings` in the main one and our attention in use."""
        originals, copies = _copied(model, base)
        _replace(model, base, originals, copies)
        for name, value in settings.items():
            setattr(copies[0], name, value)
        base.set_attn_implementation(NAME)
        return cls(originals, copies, [Snapshot.of(c) for c in copies])

    @classmethod
    def of_loaded(cls, base: Any) -> OwnConfigs:
        """For a model that has our name in its configs already; the originals still say so too."""
        copies, originals = _copied(base, base)
        return cls(originals, copies, [Snapshot.of(c) for c in copies])

    def give_back(self, model: nn.Module, base: Any) -> None:
        """Let the model have its own again; what the user changed meanwhile stays changed."""
        for original, copied, before in zip(self.originals, self.copies, self.snapshots, strict=True):
            before.carry_changes(copied, original)
        _replace(model, base, self.copies, self.originals)


def _copied(model: nn.Module, base: Any) -> tuple[list[Any], list[Any]]:
    """The config objects that the model's modules hold, the main one first, and a copy of each."""
    memo: dict[int, Any] = {}
    copy.deepcopy(base.config, memo)
    held = {id(c): c for m in _holders(model, base) if (c := m.__dict__.get("config")) is not None}
    found = [c for key, c in held.items() if key in memo]
    found.sort(key=lambda c: c is not base.config)
    return found, [memo[id(c)] for c in found]


def _replace(model: nn.Module, base: Any, old: list[Any], new: list[Any]) -> None:
    by_id = {id(o): n for o, n in zip(old, new, strict=True)}
    for module in _holders(model, base):
        if (config := module.__dict__.get("config")) is not None and id(config) in by_id:
            module.config = by_id[id(config)]


def _holders(model: nn.Module, base: Any) -> list[nn.Module]:
    """Every module that may hold a config: the model's, and those of the wrappers around it."""
    return list({id(m): m for m in (*model.modules(), *base.modules())}.values())
