"""Arms: the ways of running one model that are compared, each a method, a cache, or both."""

from __future__ import annotations

import inspect
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..caches import caches
from ..core.choices import did_you_mean
from ..patching import patched, remove
from ..patching.apply import RECORD, unwrap
from ..patterns import patterns

SETTINGS = ("layers", "mode", "sinks", "impl")
"""What `lcpatch.apply` takes beside a method's own options."""

CACHE_CHUNK = 512
"""Tokens that an arm with a cache reads at a time when it scores a text: a cache evicts between two reads."""


@dataclass(frozen=True)
class Arm:
    """One way of running the model.

    Args:
        method: None: the model as it is.
        options: of the method, and what else `apply` takes.
        cache: None: transformers' own.
        cache_options: what the cache's class takes beside the model.
        chunk: read contexts this many tokens at a time; None: in one go, or for perplexity with a cache `CACHE_CHUNK`.
        label: what to call it in reports; by default what it is.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    cache_options: Mapping[str, Any] = field(default_factory=dict)
    chunk: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        """Check the names, those of options too, and set the label."""
        of_method, of_cache = _options_of(self.method, self.cache)
        for given, known in ((self.options, of_method), (self.cache_options, of_cache)):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(no_option(unknown[0], self.method, self.cache))
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 token")
        if not self.label:
            parts = [_call(self.method, self.options)] if self.method else []
            parts += [_call(f"{self.cache} cache", self.cache_options)] if self.cache else []
            parts += [f"chunk {self.chunk}"] if self.chunk else []
            object.__setattr__(self, "label", " + ".join(parts) or "dense")

    @classmethod
    def parse(cls, text: str, values: Callable[[list[str]], dict[str, Any]], chunk: int | None = None) -> Arm:
        """From `METHOD --option value … --cache NAME --option value …`; either part may be missing.

        Args:
            values: turns the words of options into a dictionary.
            chunk: of the arm.
        """
        words = shlex.split(text)
        method = words.pop(0) if words and not words[0].startswith("--") else None
        method = None if method == "dense" else method
        if "--cache" not in words:
            return cls(method, values(words), chunk=chunk)
        at = words.index("--cache")
        if at + 1 >= len(words):
            raise ValueError(f"arm {text!r}: --cache needs a name; choices: {', '.join(caches.all())}")
        return cls(method, values(words[:at]), words[at + 1], values(words[at + 2 :]), chunk)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Callable[[], Any] | None]:
        """Patch the model for a while; gives what makes an empty cache, or None for transformers' own."""
        bare = getattr(unwrap(model), RECORD, None) is None
        with patched(model, self.method, **self.options) if self.method else nullcontext():
            try:
                yield self.maker(model)
            finally:
                if self.cache and bare and not self.method:
                    remove(model)  # a cache may have routed the attention of an unpatched model

    def maker(self, model: nn.Module) -> Callable[[], Any] | None:
        """What makes an empty cache for `model`, which is patched already; None: transformers' own."""
        if self.cache is None:
            return None
        kind = caches.get(self.cache)
        return lambda: kind(model, **self.cache_options)

    def warn(self) -> None:
        """Say what makes this arm the same as the dense one."""
        mode = self.options.get("mode") or (patterns.get(self.method).default_mode if self.method else "always")
        if mode != "always":
            warnings.warn(
                f"{self.label}: {self.method} with mode={mode!r} runs dense when it is not training, so this arm "
                "measures the dense model; add --mode always to measure it sparse",
                stacklevel=2,
            )


def sort_options(
    given: Mapping[str, Any], method: str | None, cache: str | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Which of some options belong to the method, which to the cache, and which to neither.

    Raises:
        ValueError: one that both have.
    """
    of_method, of_cache = _options_of(method, cache)
    if both := sorted(given.keys() & of_method & of_cache):
        raise ValueError(
            f"--{both[0]} is an option of the method {method!r} and of the cache {cache!r}: say which, as in "
            f"--arm '{method} --{both[0]} … --cache {cache} --{both[0]} …'"
        )
    parts = ({k: v for k, v in given.items() if k in of_method}, {k: v for k, v in given.items() if k in of_cache})
    return (*parts, {k: v for k, v in given.items() if k not in of_method | of_cache})


def no_option(name: str, method: str | None, cache: str | None) -> str:
    """What to tell whoever gave an option that neither has."""
    of_method, of_cache = map(sorted, _options_of(method, cache))
    known = [f"the method {method!r} has {', '.join(of_method)}"] if method else []
    known += [f"the cache {cache!r} has {', '.join(of_cache) or 'none'}"] if cache else []
    guess = did_you_mean(name, [*of_method, *of_cache])
    return f"no option {name!r}.{guess} " + ("; ".join(known) or "options are of a --method or a --cache: name one")


def _options_of(method: str | None, cache: str | None) -> tuple[set[str], set[str]]:
    of_method = {*patterns.get(method)().to_options(), *SETTINGS} if method else set()
    return of_method, set(list(inspect.signature(caches.get(cache)).parameters)[1:]) if cache else set()


def _call(name: str | None, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else str(name)
