"""Pictures of attention masks at a picture's resolution, so that a million tokens cost what a thousand do.

A cell's value is the share of its causal pairs that a rule keeps, counted from the rule's integers, never from a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec, Rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1b2733"
GREY = "#8a94a0"
MASKED = "#e9edf2"  # causal, but not attended
SHADES = [MASKED, "#9cc3ea", "#3f83c4", "#0f3b73"]
SAMPLED_ROWS = 32  # rows counted per picture row; all of them up to 32 x size tokens


def shares(rule: Rule, block_size: int, length: int, size: int = 256) -> Tensor:
    """The mask of `rule` at `length` tokens as shares in [0, 1], [R, R] with R = min(length, size).

    Exact up to 32 * size tokens; beyond, a cell's rows are sampled evenly. NaN where a cell has nothing to attend to.
    """
    size = min(length, size)
    edges = torch.arange(size + 1) * length // size
    if length <= SAMPLED_ROWS * size:
        rows = torch.arange(length)
    else:
        step = (edges[1:] - edges[:-1])[:, None]
        rows = (edges[:-1, None] + torch.arange(SAMPLED_ROWS) * step // SAMPLED_ROWS).flatten()
    cell = torch.searchsorted(edges, rows, right=True) - 1

    def per_cell(counts: Tensor) -> Tensor:
        return torch.zeros(size, size).index_add_(0, cell, counts.diff(dim=1).float())

    kept = per_cell(num_kept(rule, block_size, rows, edges, length))
    causal = per_cell(torch.minimum(edges, rows[:, None] + 1))
    everything = per_cell(edges.expand(len(rows), -1))
    pairs = torch.where(causal > 0, causal, everything)
    return torch.where((causal > 0) | (kept > 0), (kept / pairs).clamp(max=1), torch.nan)


def num_kept(rule: Rule, block_size: int, rows: Tensor, edges: Tensor, length: int) -> Tensor:
    """How many keys j < edge each row keeps, [rows, edges]."""
    i, x = rows[:, None], edges[None]
    group, offset = rule.resolve(length)
    if rule.cyclic:
        turn = group // 2 if offset else 0
        rolled = (i - turn) % length
        start = (rolled // group * group + turn) % length
        end = start + rolled % group + 1
        return (torch.minimum(x, end) - start).clamp(min=0) + torch.minimum(x, end - length).clamp(min=0)
    lo = ((i + offset) // group * group - offset - rule.back).clamp(min=0)
    sinks = lo.clamp(max=rule.sinks)
    kept = torch.minimum(x, sinks) + (torch.minimum(x, i + 1) - lo).clamp(min=0)
    if rule.stride:
        kept = kept + _num_striped(torch.minimum(x, lo), rule, block_size)
        kept = kept - _num_striped(torch.minimum(x, sinks), rule, block_size)
    return kept


def coverage(specs: list[BlockSparseSpec], length: int) -> float:
    """Share of `length` tokens that the last of them sees through some head of some layer in `specs`."""
    rules = {(rule, spec.block_size) for spec in specs for rule in spec.rules}
    last, edges = torch.tensor([length - 1]), torch.arange(length + 1)
    seen = torch.zeros(length, dtype=torch.bool)
    for rule, block_size in rules:
        seen |= num_kept(rule, block_size, last, edges, length).diff(dim=1)[0] > 0
    return float(seen.float().mean())


def draw_mask(ax: Axes, image: Tensor, length: int, *, keys: bool = True, queries: bool = True) -> Any:
    """Draw `shares` on `ax`: query tokens downwards, key tokens to the right. Returns the image, for a colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colours = LinearSegmentedColormap.from_list("lcpatch", SHADES).with_extremes(bad="white")
    norm = PowerNorm(0.6, 0, 1)  # a stripe or a sink much thinner than a pixel still shows
    drawn = ax.imshow(image.numpy(), cmap=colours, norm=norm, extent=(0, length, length, 0), interpolation="nearest")
    ticks = [0, length // 2, length]
    ax.set_xticks(ticks, [tokens(t) for t in ticks] if keys else [])
    ax.set_yticks(ticks, [tokens(t) for t in ticks] if queries else [])
    for label, side in zip(ax.get_xticklabels(), ("left", "center", "right"), strict=False):
        label.set_horizontalalignment(side)  # the next panel's labels are near
    if keys:
        ax.set_xlabel("key", color=GREY, fontsize=8, labelpad=1)
    if queries:
        ax.set_ylabel("query", color=GREY, fontsize=8, labelpad=1)
    ax.tick_params(length=2, labelsize=7.5, colors=GREY)
    ax.spines[:].set_visible(False)  # they would hide the sinks
    return drawn


def colour_bar(figure: Any, drawn: Any, where: Any, label: str) -> None:
    """Say on the axes `where` what the shades of `draw_mask` mean."""
    bar = figure.colorbar(drawn, cax=where, ticks=[0, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "¼", "½", "all"])
    bar.ax.tick_params(length=2, labelsize=7.5, colors=GREY)
    bar.outline.set_visible(False)
    bar.set_label(label, color=GREY, fontsize=8)


def tokens(count: int) -> str:
    """A number of tokens, short: 4096 is 4K."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _num_striped(end: Tensor, rule: Rule, block_size: int) -> Tensor:
    """Keys j < end in the stripe."""
    period, start = rule.stride * block_size, rule.residue * block_size
    return end // period * block_size + (end % period - start).clamp(0, block_size)
