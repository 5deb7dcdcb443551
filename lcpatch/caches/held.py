"""What layers hold, ours or transformers', in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def bytes_held(layers: Iterable[Any]) -> dict[str, int]:
    """Bytes per tier that layers of ours or of transformers hold."""
    total = {"device": 0}
    for layer in layers:
        for tier, held in _tiers(layer).items():
            total[tier] = total.get(tier, 0) + held
    return total


def _tiers(layer: Any) -> dict[str, int]:
    if hasattr(layer, "tiers"):
        return layer.tiers()
    if hasattr(layer, "memory"):
        return {"device": layer.memory()}
    held: dict[str, dict[int, int]] = {"device": {}}
    for x in tensors_in(vars(layer)):  # transformers' offloaded layers leave the device that they were made on
        tier = "device" if x.device == getattr(layer, "device", x.device) else "host"
        held.setdefault(tier, {})[x.data_ptr()] = x.untyped_storage().nbytes()
    return {tier: sum(sizes.values()) for tier, sizes in held.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that hold a value's data: linear attention keeps its states in dictionaries, quantised layers keep
    tuples, or tensors that are made of others and have no storage."""
    if isinstance(value, dict | tuple | list):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(x)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
