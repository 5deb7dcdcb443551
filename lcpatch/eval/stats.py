"""How sure a difference is: bootstrap intervals, paired differences, and the share of a gap that a method recovers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
MIN_SEEDS = 3

Interval = tuple[float, float, float]
"""A mean and the ends of its interval."""


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of `values` and its 95 % percentile interval; of a single value, NaN ends."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("nothing was measured, so there is no mean")
    if data.size == 1:
        return float(data[0]), math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, data.size, (resamples, data.size))].mean(1)
    return (float(data.mean()), *_ends(means))


def paired(values: Sequence[float], base: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of `values - base`, sample by sample, and its interval.

    Raises:
        ValueError: not the same samples.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} and {len(base)} results are not of the same samples")
    return bootstrap(np.subtract(values, base).tolist(), resamples, seed)


def recovery(
    arm: Sequence[Sequence[float]],
    full: Sequence[Sequence[float]],
    baselines: Mapping[str, Sequence[Sequence[float]]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """R = (P0 - Px) / (P0 - Pfull): the share of the gap between a baseline and full attention that an arm closes.

    Source: SinkLoRA, arXiv 2406.05678, which states neither P0 nor Pfull; so R is given against every baseline (such as
    "pi": position interpolation untuned, "short": trained with short attention), of perplexities ("ppl") and of their
    logarithms ("nats").

    Args:
        arm: mean losses in nats, [seeds][windows]: one training run a seed, the same windows in all.
        full: of full attention.
        baselines: P0 by name. One that has no training, and so only one run, is used for every seed.
        resamples: draws of seeds and, within them, of windows.

    Raises:
        ValueError: fewer than three seeds, or other windows.
    """
    x, top = _losses("arm", arm), _losses("full", full)
    results = {}
    for name, losses in baselines.items():
        base = _losses(name, losses if len(losses) > 1 else [losses[0]] * len(x))
        if not x.shape == top.shape == base.shape:
            raise ValueError(
                f"recovery needs the same seeds and windows: {x.shape}, full {top.shape}, {name} {base.shape}"
            )
        stack = np.stack([base, x, top])
        rng = np.random.default_rng(seed)
        draws = []
        for _ in range(resamples):
            rows = rng.integers(0, x.shape[0], x.shape[0])
            windows = rng.integers(0, x.shape[1], x.shape[1])
            draws.append(stack[:, rows][:, :, windows].mean((1, 2)))
        here, sampled = _shares(stack.mean((1, 2))[None]), _shares(np.array(draws))
        results[name] = {unit: (float(here[unit][0]), *_ends(sampled[unit])) for unit in here}
    return results


def recovered(
    arm: Sequence[Sequence[float]], full: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> dict[str, float]:
    """R alone, of runs [seeds][windows] that share their seeds and windows: of seeds too few for an interval."""
    shares = _shares(np.asarray([base, arm, full], dtype=np.float64).mean((1, 2))[None])
    return {unit: float(share[0]) for unit, share in shares.items()}


def _losses(name: str, values: Sequence[Sequence[float]]) -> np.ndarray:
    if len(values) < MIN_SEEDS:
        raise ValueError(f"recovery needs at least {MIN_SEEDS} seeds; {name!r} has {len(values)}: train it with more")
    if len({len(row) for row in values}) != 1:
        raise ValueError(f"the seeds of {name!r} were measured on different numbers of windows")
    return np.asarray(values, dtype=np.float64)


def _shares(losses: np.ndarray) -> dict[str, np.ndarray]:
    """[draws, (base, arm, full)] -> [draws] by unit; a draw without a gap says nothing."""
    found = {}
    for unit, change in (("ppl", np.exp), ("nats", np.asarray)):
        base, arm, full = change(losses).T
        gap = base - full
        found[unit] = np.divide(base - arm, gap, out=np.full(len(gap), np.nan), where=gap != 0)
    return found


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
