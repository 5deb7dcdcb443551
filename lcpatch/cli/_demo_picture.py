"""The demo's picture: each method's mask, and below them perplexity by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from torch.nn import functional as F

from ..patching.draw import GREY, INK, colour_bar, draw_mask, shares, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ._compare import Arm

COLOURS = ["#3a4653", "#2166ac", "#c2571a", "#a3262a", "#2a7f4f", "#7b4fa3", "#a8892c", "#2b8a99"]


def draw(arms: Sequence[Arm], title: str) -> Figure:
    """The picture of `arms`, the first of which is dense."""
    length = len(arms[0].nll) + 1
    sparse = arms[1:]
    columns = max(len(sparse), 1)
    figure = Figure(figsize=(max(2.6 * columns, 7.8) + 1.2, 7.6), facecolor="white")
    width, height = figure.get_size_inches()
    left, right = 0.75 / width, 1 - 1.15 / width
    figure.text(left, 1 - 0.32 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    note = "Above: share of the first layer's heads that see a key. Below: perplexity of the tokens around a position."
    figure.text(left, 1 - 0.6 / height, note, fontsize=9, color=GREY, va="center")
    masks = figure.add_gridspec(
        1, columns, left=left, right=right, top=1 - 1.15 / height, bottom=1 - 3.6 / height, wspace=0.18
    )
    drawn = None
    for number, arm in enumerate(sparse):
        ax = figure.add_subplot(masks[number])
        drawn = draw_mask(ax, _mean_over_heads(arm, length), length, queries=number == 0)
        ax.set_title(f"{arm.name} · {arm.density:.0%} of pairs", fontsize=10, color=_colour(number + 1), weight="bold")
    if drawn is not None:
        where = figure.add_axes((right + 0.22 / width, 1 - 3.35 / height, 0.1 / width, 1.2 / height))
        colour_bar(figure, drawn, where, "share of pairs kept")
    below = figure.add_axes((left, 0.6 / height, right - left, 2.75 / height))
    _curves(below, arms, length)
    return figure


def _mean_over_heads(arm: Arm, length: int) -> Tensor:
    by_rule = [shares(rule, arm.spec.block_size, length, size=330) for rule in arm.spec.rules]
    return torch.stack([by_rule[rule] for rule in arm.spec.head_rules]).nanmean(0)


def _curves(ax: Axes, arms: Sequence[Arm], length: int) -> None:
    window = max(length // 16, 1) | 1
    ends = []
    for number, arm in enumerate(arms):
        nll = arm.nll.double()
        # Mean over the tokens around each position, of those there are.
        pool = F.avg_pool1d(nll[None, None], window, stride=1, padding=window // 2, count_include_pad=False)
        curve = pool[0, 0].exp()
        line = {"linewidth": 2.2 if number == 0 else 1.7, "color": _colour(number), "zorder": 3 if number == 0 else 2}
        ax.plot(range(1, length), curve.numpy(), **line)
        ends.append((float(curve[-1].log()), arm.name, _colour(number)))
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    bottom = -torch.inf
    gap = 0.065 * float(torch.tensor(high / low).log())  # labels closer than this would overlap
    for at, name, colour in sorted(ends):
        bottom = max(at, bottom + gap)
        y = float(torch.tensor(bottom).exp())
        ax.text(length * 1.012, y, name, color=colour, fontsize=9.5, weight="bold", va="center", clip_on=False)
    ax.set_xlim(0, length)
    ax.set_xticks([length * n // 8 for n in range(9)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("position in the text, in tokens", color=GREY, fontsize=9)
    ax.set_ylabel(f"perplexity, over {window} tokens", color=GREY, fontsize=9)
    ax.grid(axis="y", which="major", color="#e3e8ee", linewidth=0.8)
    ax.tick_params(which="both", length=0, labelsize=8.5, colors=GREY)
    ax.spines[:].set_visible(False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
