"""Pictures of a report: perplexity by length and by position, a needle's heat map, and every task side by side."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

INK = "#1b2733"
GREY = "#6d7884"
LINE = "#e3e8ee"
COLOURS = ["#3a4653", "#2166ac", "#c2571a", "#a3262a", "#2a7f4f", "#7b4fa3", "#a8892c", "#2b8a99"]
SHADES = ["#a3262a", "#e8a27c", "#f5ead6", "#9cc3ea", "#2166ac"]
LABEL = 46
"""Letters of an arm's label that a legend has room for."""
POINT = 512
"""Tokens behind one point of perplexity by position: fewer are mostly noise."""
TOP = 1.4
"""Inches above the heat maps."""


def draw_all(report: Report) -> dict[str, Figure]:
    """Every picture that this report has data for, by file name."""
    pictures = {}
    if "perplexity" in report.options:
        pictures["perplexity.png"] = perplexity(report)
    for task in report.options:
        if any("depth" in row for row in report.rows if row["task"] == task):
            pictures[f"{task}.png"] = heat_maps(report, task)
    if any(cell["metric"] in ("rank", "generate") for cell in report.cells):
        pictures["tasks.png"] = bars(report)
    return pictures


def perplexity(report: Report) -> Figure:
    """Left: by length of the window; right: by position in the longest one."""
    lengths = report.lengths("perplexity")
    many = len(lengths) > 1
    figure = titled(10.6 if many else 7.6, 4.9, f"Perplexity of {report.header['text']}", _note(report))
    grid = figure.add_gridspec(1, 1 + many, left=0.075, right=0.97, top=0.8, bottom=0.22, wspace=0.17)
    if many:
        ax = figure.add_subplot(grid[0])
        for number, arm in enumerate(report.arms):
            cells = [_cell(report, "perplexity", length, "nll", arm) for length in lengths]
            _band(ax, lengths, cells, number)
        _log_axes(ax, lengths, "tokens of context and text together")
        ax.set_title("by length", loc="left", fontsize=10, color=INK, weight="bold")
    ax = figure.add_subplot(grid[-1])
    for number, arm in enumerate(report.arms):
        rows = report.rows_of("perplexity", arm, lengths[-1])
        ax.plot(*_by_position([row["positions"] for row in rows]), **_style(number))
    _log_axes(ax, None, "position in the window, in tokens")
    ax.set_xlim(0, lengths[-1])
    ax.set_xticks([lengths[-1] * n // 4 for n in range(5)], [tokens(lengths[-1] * n // 4) for n in range(5)])
    ax.set_title(f"by position, {tokens(lengths[-1])} tokens", loc="left", fontsize=10, color=INK, weight="bold")
    _legend(figure, report)
    return figure


def heat_maps(report: Report, task: str) -> Figure:
    """One map an arm and way of scoring: depth downwards, length to the right, the share of right answers as colour."""
    from matplotlib.colors import LinearSegmentedColormap

    rows = [row for row in report.rows if row["task"] == task]
    ways = [way for way in ("generate", "rank") if all(way in row for row in rows)]
    lengths, depths = report.lengths(task), sorted({row["depth"] for row in rows})
    colours = LinearSegmentedColormap.from_list("lcpatch", SHADES)
    wide, high = max(0.62 * len(lengths), 2.5), max(0.36 * len(depths), 1.5)  # inches of a map
    count = len(report.arms)
    width, height = max(0.95 + count * wide + (count - 1) * 0.3 + 1.1, 7.0), TOP + len(ways) * (high + 0.75)
    figure = titled(width, height, f"{task}: {_title(task)}", _note(report))
    for across, arm in enumerate(report.arms):
        for down, way in enumerate(ways):
            left, top = 0.95 + across * (wide + 0.3), TOP + down * (high + 0.75)
            ax = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
            image = [[_mean(rows, arm, length, depth, way) for length in lengths] for depth in depths]
            drawn = ax.imshow(image, cmap=colours, vmin=0, vmax=1, aspect="auto")
            _annotate(ax, image)
            ax.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
            ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths] if across == 0 else [])
            name = {"generate": "generated", "rank": f"ranked, chance {rows[0]['chance']:.0%}"}[way]
            ax.set_title(name, loc="left", fontsize=8.5, color=GREY, pad=4)
            if down == 0:
                place = (left / width, 1 - (top - 0.26) / height)
                label = "\n".join(textwrap.wrap(arm, round(wide * 12), max_lines=2, placeholder=" …"))
                figure.text(*place, label, fontsize=9, color=INK, weight="bold", va="bottom", linespacing=1.1)
            if across == 0:
                ax.set_ylabel("depth", color=GREY, fontsize=8.5)
            if down == len(ways) - 1:
                ax.set_xlabel("length, in tokens", color=GREY, fontsize=8.5)
            quiet(ax)
    bar = figure.add_axes((1 - 0.85 / width, 1 - (TOP + high) / height, 0.12 / width, high / height))
    scale = figure.colorbar(drawn, cax=bar, ticks=[0, 0.5, 1])
    scale.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=8, color=GREY)
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    return figure


def bars(report: Report) -> Figure:
    """Every task that has answers: its arms side by side with their intervals, and chance as a mark."""
    names = [
        t for t in report.options if any(c["metric"] in ("rank", "generate") for c in report.cells if c["task"] == t)
    ]
    groups = [(t, m) for t in names for m in ("generate", "rank") if any(_is(c, t, m) for c in report.cells)]
    bar = 0.17  # inches
    step = max(bar * len(report.arms) + 0.16, 0.36)
    high = step * len(groups)
    width, height = 8.6, 0.95 + high + 0.9
    figure = titled(width, height, "Share of right answers, mean over lengths", _note(report))
    ax = figure.add_axes((2.35 / width, 0.9 / height, (width - 2.35 - 0.4) / width, high / height))
    for place, (task, metric) in enumerate(groups):
        for number, arm in enumerate(report.arms):
            y = place * step + (number - (len(report.arms) - 1) / 2) * bar
            mean, low, high_ = _over_lengths(report, task, metric, arm)
            ax.barh(y, mean, height=bar * 0.86, color=COLOURS[number % len(COLOURS)])
            if mean == 0:
                ax.text(0.006, y, "0", fontsize=7.5, color=COLOURS[number % len(COLOURS)], va="center")
            if not math.isnan(low):
                ax.plot([low, high_], [y, y], color="white", linewidth=3, solid_capstyle="butt", alpha=0.8)
                ax.plot([low, high_], [y, y], color=INK, linewidth=1, solid_capstyle="butt")
        if metric == "rank":
            chance = [c["chance"] for c in report.cells if _is(c, task, metric)]
            reach = step / 2 - 0.05
            ends = [place * step - reach, place * step + reach]
            ax.plot([chance[0]] * 2, ends, color="white", linewidth=2.4, alpha=0.6)
            ax.plot([chance[0]] * 2, ends, color=INK, linewidth=1.4, linestyle=":")
    labels = [f"{task} · {'generated' if metric == 'generate' else 'ranked'}" for task, metric in groups]
    ax.set_yticks([place * step for place in range(len(groups))], labels)
    ax.set_ylim(step * (len(groups) - 0.5), -step / 2)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.grid(axis="x", color=LINE, linewidth=0.8)
    ax.set_axisbelow(True)
    quiet(ax)
    ax.tick_params(axis="y", labelsize=9, labelcolor=INK)
    _legend(figure, report, "dotted: chance; thin line: 95 % interval")
    return figure


def tokens(count: int) -> str:
    """A number of tokens, short: 4096 is 4K."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _short(label: str, letters: int) -> str:
    return label if len(label) <= letters else label[: letters - 1] + "…"


def titled(width: float, height: float, title: str, note: str) -> Figure:
    """An empty figure of so many inches, with a title and a line below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.3 / width, 1 - 0.3 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    figure.text(0.3 / width, 1 - 0.57 / height, note, fontsize=9, color=GREY, va="center")
    return figure


def _note(report: Report) -> str:
    return f"{report.header['model']}, {report.header['dtype']}"


def _legend(figure: Figure, report: Report, note: str = "") -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{**_style(n), "linewidth": 4}) for n in range(len(report.arms))]
    height = figure.get_size_inches()[1]
    figure.legend(
        handles, [_short(arm, LABEL) for arm in report.arms], loc="lower left", ncols=min(3, len(handles)),
        frameon=False, fontsize=9, labelcolor=INK, bbox_to_anchor=(0.02, 0.05 / height), handlelength=1.2,
    )  # fmt: skip
    if note:
        figure.text(0.98, 0.22 / height, note, fontsize=8, color=GREY, ha="right", va="center")


def _style(number: int) -> dict[str, Any]:
    first = number == 0
    return {"color": COLOURS[number % len(COLOURS)], "linewidth": 2.2 if first else 1.7, "zorder": 3 - 0.1 * number}


def _band(ax: Axes, lengths: list[int], cells: list[dict[str, Any]], number: int) -> None:
    style = _style(number)
    ax.plot(lengths, [c["perplexity"] for c in cells], marker="o", markersize=4, **style)
    ends = [[math.exp(c[name]) for c in cells] for name in ("mean_low", "mean_high")]
    if not any(map(math.isnan, ends[0])):
        ax.fill_between(lengths, *ends, color=style["color"], alpha=0.12, linewidth=0)


def _log_axes(ax: Axes, lengths: list[int] | None, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if lengths:
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [tokens(n) for n in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label, color=GREY, fontsize=9)
    ax.grid(axis="y", color=LINE, linewidth=0.8)
    quiet(ax)


def quiet(ax: Axes) -> None:
    """Without frame and ticks."""
    ax.tick_params(which="both", length=0, labelsize=8.5, colors=GREY)
    ax.spines[:].set_visible(False)


def _annotate(ax: Axes, image: list[list[float]]) -> None:
    for y, line in enumerate(image):
        for x, value in enumerate(line):
            light = value < 0.15 or value > 0.85
            ax.text(x, y, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=8, color="white" if light else INK)


def _mean(rows: list[dict[str, Any]], arm: str, length: int, depth: float, way: str) -> float:
    found = [r[way] for r in rows if (r["arm"], r["length"], r["depth"]) == (arm, length, depth)]
    return sum(found) / len(found)


def _by_position(windows: list[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Positions and the perplexity around them, over as many bins at a time as hold POINT tokens in all windows."""
    bins = list(zip(*windows, strict=True))
    size = sum(part[1] - part[0] for part in bins[0])
    step = max(1, round(POINT / size))
    groups = [bins[n : n + step] for n in range(0, len(bins), step)]
    if len(groups) > 1 and len(groups[-1]) < step:
        groups[-2:] = [groups[-2] + groups[-1]]
    middles = [(group[0][0][0] + group[-1][0][1]) / 2 for group in groups]
    sums = [[(b - a, (b - a) * mean) for part in group for a, b, mean in part] for group in groups]
    return middles, [math.exp(sum(total for _, total in s) / sum(count for count, _ in s)) for s in sums]


def _over_lengths(report: Report, task: str, metric: str, arm: str) -> tuple[float, float, float]:
    from .stats import bootstrap

    return bootstrap([row[metric] for row in report.rows_of(task, arm)])


def _cell(report: Report, task: str, length: int, metric: str, arm: str) -> dict[str, Any]:
    return next(c for c in report.cells if _is(c, task, metric) and (c["length"], c["arm"]) == (length, arm))


def _is(cell: dict[str, Any], task: str, metric: str) -> bool:
    return (cell["task"], cell["metric"]) == (task, metric)


def _title(task: str) -> str:
    from .report import title_of

    return title_of(task)
