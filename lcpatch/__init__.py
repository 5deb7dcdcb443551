"""Patch any Hugging Face causal LM for long context, train it, compress its cache, measure it, publish it.

    import lcpatch
    model = lcpatch.apply(model, "s2")

Importing this changes nothing in any other library and imports none of them: every name below loads its room when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "apply": "patching",
    "remove": "patching",
    "patched": "patching",
    "report": "patching",
    "register": "hf",
    "decode_ahead": "hf.decode_ahead",
    "load_cache": "hub",
    "save_pretrained": "hub",
    "from_pretrained": "hub",
    "push_to_hub": "hub",
    "PatchConfig": "core.config",
    "HubError": "core.errors",
    "LcpatchError": "core.errors",
    "StoreError": "core.errors",
    "UnknownNameError": "core.errors",
    "UnsupportedModelError": "core.errors",
}


def methods() -> dict[str, type]:
    """The registered attention methods by name: what `lcpatch.apply` takes."""
    from .patterns import patterns

    return patterns.all()


def _caches() -> dict[str, type]:
    from .caches import caches

    return caches.all()


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # what Python itself asks modules for (__path__, __wrapped__) must load nothing
        raise AttributeError(f"module 'lcpatch' has no attribute {name!r}")
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:  # the class of a method (S2, SF, …) or of a cache (S2Cache, …)
        classes = _caches() if name.endswith("Cache") else methods()
        value = {cls.__name__: cls for cls in classes.values()}.get(name)
    if value is None:
        raise AttributeError(f"module 'lcpatch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    classes = [*methods().values(), *_caches().values()]
    return sorted(["__version__", "methods", *_HOME, *(cls.__name__ for cls in classes)])
