"""How much of the full attention a cache that reads part of its past still sees: measured when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def recall(layers: Iterable[Any]) -> dict[str, Any]:
    """What `stats(measure=True)` adds: how much of the full attention the pages read by the last generated token hold.

    `mass_recalled`: for every query head, the softmax over all of the row's keys (without a learnable sink logit) gives
    each key a share; those of the keys that the token attended to, added up; the mean over layers, rows and query
    heads. 1: nothing was missed. The keys are those that the cache holds, after its codec, and in a model of several
    layers a query already stems from what the layers before it have read. `mass_recalled_by_layer`: the same by layer,
    of those that choose pages. None and empty where the last step was no generated token.

    Nothing of it is computed before it is asked for, and then from the last token's query alone: one attention over
    everything per layer, for which pages that lie elsewhere are brought in, one layer at a time.
    """
    found = {n: layer.recalled() for n, layer in enumerate(layers) if hasattr(layer, "recalled")}
    by_layer = {n: float(x.nanmean()) for n, x in found.items() if x is not None}
    mean = sum(by_layer.values()) / len(by_layer) if by_layer else None
    return {"mass_recalled": mean, "mass_recalled_by_layer": by_layer}
