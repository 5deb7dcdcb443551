"""A registry that fills itself: one file per method, found by scanning its own folder at the first look-up."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from .choices import did_you_mean
from .errors import UnknownNameError

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Maps names to classes that registered themselves with `@registry.register("name")`.

    Args:
        kind: what is registered, for messages ("pattern").
        package: the package whose modules hold the classes; imported at the first look-up, not before.
        ambiguous: names that are refused with an explanation, because the literature uses them for different things.
    """

    def __init__(self, kind: str, package: str, ambiguous: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._package = package
        self._ambiguous = dict(ambiguous or {})
        self._classes: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: make the class known as `name` (lower case, an identifier) and set its `name` attribute."""
        if not name.isidentifier() or name != name.lower():
            raise ValueError(f"{self.kind} name {name!r} must be a lower-case identifier")

        def add(cls: T) -> T:
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} name {name!r} is taken by {known.__qualname__}")
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> T:
        """The class registered as `name`.

        Raises:
            UnknownNameError: no such name, or an ambiguous one; the message lists the choices.
        """
        classes = self.all()
        if name in classes:
            return classes[name]
        if hint := self._ambiguous.get(name.lower()):
            raise UnknownNameError(f"{self.kind} {name!r} is ambiguous: {hint}. Choices: {', '.join(classes)}.")
        guess = did_you_mean(name.lower(), classes)
        raise UnknownNameError(f"unknown {self.kind} {name!r}.{guess} Choices: {', '.join(classes)}.")

    def all(self) -> dict[str, T]:
        """Every registered class by name, sorted."""
        if not self._scanned:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._scanned = True
        return dict(sorted(self._classes.items()))
