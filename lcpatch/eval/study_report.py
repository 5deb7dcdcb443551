"""What a study found: its tables, and a picture of how each arm learned and where it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.markdown import table
from .stats import MIN_SEEDS, bootstrap, recovered, recovery
from .study import FULL, SHORT, UNTUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .store import Store

SMOOTH = 10
"""Steps behind one point of a loss curve: each is one row of text, and rows differ more than arms do."""


def summary(store: Store) -> str:
    """The study as Markdown tables: perplexity with intervals, pass keys, and what each arm recovers."""
    rows = list(store.rows.values())
    lengths = map(str, store.header["lengths"])
    return "\n\n".join(f"**{length} tokens**\n\n{_table(rows, length)}" for length in lengths)


def picture(store: Store) -> Figure:
    """Left: training loss by step; right: perplexity at the longest context, run densely, patched and with a cache."""
    from .plots import titled, tokens

    rows, length = list(store.rows.values()), store.header["lengths"][-1]
    names = [name for name in _arms(rows) if name != UNTUNED]
    model, steps = store.header["training"]["model"], max(len(row["train_losses"]) for row in rows)
    least, most = (bound(len(_rows_of(rows, name)) for name in names) for bound in (min, max))
    seeds = f"{least} to {most}" if least < most else str(most)
    note = f"{seeds} seed{'s' * (most > 1)}, equal budgets; bars: 95 %"
    figure = titled(10.6, 5.2, f"{model}: {steps} steps of {tokens(length)} tokens", note)
    grid = figure.add_gridspec(1, 2, left=0.07, right=0.97, top=0.8, bottom=0.12, wspace=0.42)
    _curves(figure.add_subplot(grid[0]), rows, names)
    _ends_of(figure.add_subplot(grid[1]), rows, names, str(length))
    return figure


def losses_of(rows: Sequence[Mapping[str, Any]], arm: str, way: str, length: str) -> list[list[float]]:
    """[seeds][windows] of one arm, seeds in order."""
    return list(_by_seed(rows, arm, way, length).values())


def _by_seed(rows: Sequence[Mapping[str, Any]], arm: str, way: str, length: str) -> dict[int, list[float]]:
    mine = sorted(_rows_of(rows, arm), key=lambda row: row["seed"])
    return {row["seed"]: row["perplexity"][way][length] for row in mine if way in row["perplexity"]}


def _rows_of(rows: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["arm"] == arm]


def _arms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _ways(rows: Sequence[Mapping[str, Any]], arm: str) -> list[str]:
    return list(next(row["perplexity"] for row in rows if row["arm"] == arm))


def _table(rows: Sequence[Mapping[str, Any]], length: str) -> str:
    header = ("Arm", "Run", "Seeds", "Perplexity", "Pass keys", "R, from PI alone", "R, from short", "s a step", "GiB")
    return table(header, [_line(rows, arm, way, length) for arm in _arms(rows) for way in _ways(rows, arm)])


def _line(rows: Sequence[Mapping[str, Any]], arm: str, way: str, length: str) -> tuple[str, ...]:
    losses = losses_of(rows, arm, way, length)
    mean, low, high = _perplexity(losses)
    mine = _rows_of(rows, arm)
    keys = [row["passkey"][way][length] for row in mine if way in row["passkey"]]
    steps = [
        row["train_seconds"] / len(row["train_losses"]) for row in mine if row["train_losses"] and row["train_seconds"]
    ]
    peaks = [row["peak_gib"] for row in mine if row["train_losses"] and row["peak_gib"]]
    return (
        arm,
        way,
        str(len(losses)),
        f"{mean:.3f} ({low:.3f} to {high:.3f})",
        f"{np.mean(keys):.2f}" if keys else "",
        _recovered(rows, arm, way, length, UNTUNED),
        _recovered(rows, arm, way, length, SHORT),
        f"{np.median(steps):.2f}" if steps else "",
        f"{max(peaks):.1f}" if peaks else "",
    )


def _perplexity(losses: list[list[float]]) -> tuple[float, float, float]:
    """Of [seeds][windows], and its interval over windows."""
    mean, low, high = bootstrap(np.mean(losses, 0).tolist())
    return math.exp(mean), math.exp(low), math.exp(high)


def _recovered(rows: Sequence[Mapping[str, Any]], arm: str, way: str, length: str, base: str) -> str:
    """R of the seeds that the arm and both ends of the gap have, over perplexities and over their logarithms.

    Of two seeds, which make no interval, each one's own R is there instead; a single run says nothing of its chance.
    """
    if arm in (UNTUNED, FULL, base):
        return ""
    found, full = _by_seed(rows, arm, way, length), _by_seed(rows, FULL, "dense", length)
    start = _by_seed(rows, base, "dense", length)
    if base == UNTUNED and start:  # without training nothing was drawn: its one run is every seed's
        start = dict.fromkeys(found, *start.values())
    seeds = [seed for seed in found if seed in full and seed in start]
    runs = [[losses[seed] for seed in seeds] for losses in (found, full, start)]
    if len(seeds) < 2:
        return ""
    if len(seeds) < MIN_SEEDS:
        share = recovered(*runs)
        each = [recovered([x], [top], [p0])["ppl"] for x, top, p0 in zip(*runs, strict=True)]
        r, nats, spread = share["ppl"], share["nats"], "by seed " + " and ".join(f"{one:.0%}" for one in each)
    else:
        units = recovery(*runs[:2], {base: runs[2]})[base]
        (r, low, high), (nats, *_) = units["ppl"], units["nats"]
        spread = f"{low:.0%} to {high:.0%}"
    fewer = f"; {len(seeds)} seeds" if len(seeds) < len(found) else ""
    return f"{r:.0%} ({spread}; nats {nats:.0%}{fewer})"


def _curves(ax: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    from .plots import GREY, INK, LINE, quiet

    for number, arm in enumerate(names):
        mine = _rows_of(rows, arm)
        runs = [row["train_losses"] for row in mine]
        mean = np.mean([run[: min(map(len, runs))] for run in runs], 0)
        window = min(SMOOTH, len(mean))
        smooth = np.convolve(mean, np.ones(window) / window, "valid")
        drawn = any(row["settings"].get("keep_chunks", 1) < 1 for row in mine)
        look = {**_look(number), **({"linewidth": 0.8, "alpha": 0.5} if drawn else {})}
        label = f"{arm} (estimates)" if drawn else arm  # of a part of the row's chunks: SpaCO's losses scatter
        ax.plot(range(window, len(mean) + 1), smooth, label=label, **look)
    ax.set_title(f"training loss, mean of {SMOOTH} steps", loc="left", fontsize=10, color=INK, weight="bold")
    ax.set_xlabel("step", color=GREY, fontsize=9)
    ax.grid(axis="y", color=LINE, linewidth=0.8)
    ax.legend(frameon=False, fontsize=8.5, ncols=2, labelcolor=INK)
    quiet(ax)


def _ends_of(ax: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], length: str) -> None:
    from .plots import GREY, INK, LINE, quiet

    marks = {"dense": "o", "patched": "s"}
    used: dict[str, Any] = {}
    for number, arm in enumerate(names):
        for offset, way in enumerate(_ways(rows, arm)):
            mean, low, high = _perplexity(losses_of(rows, arm, way, length))
            y = number + 0.24 * (offset - 0.5)
            colour = _look(number)["color"]
            ax.plot([low, high], [y, y], color=colour, linewidth=1.4, alpha=0.5)
            (dot,) = ax.plot(mean, y, marks.get(way, "^"), color=colour, markersize=5.5)
            used.setdefault(way, dot)
    if base := losses_of(rows, UNTUNED, "dense", length):
        untuned = math.exp(np.mean(base))
        if untuned < 3 * ax.get_xlim()[1]:
            used["before training"] = ax.axvline(untuned, color=GREY, linewidth=1, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_title(f"perplexity at {length} tokens", loc="left", fontsize=10, color=INK, weight="bold")
    ax.grid(axis="x", color=LINE, linewidth=0.8)
    legend = ax.legend(used.values(), used, frameon=False, fontsize=8.5, labelcolor=INK)
    for handle in legend.legend_handles:
        handle.set_color(GREY)
    quiet(ax)


def _look(number: int) -> dict[str, Any]:
    from .plots import COLOURS

    style = "-" if number < len(COLOURS) else "--"
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": 1.5}
