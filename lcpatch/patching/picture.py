"""A picture of the mask of every head of one layer, at any length."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lcpatch_kernels import BlockSparseSpec

from ..hf.layers import with_sink_tokens
from ..patterns import AttentionPattern, LayerShape
from .draw import GREY, INK, colour_bar, coverage, draw_mask, shares, tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def draw(pattern: AttentionPattern, shape: LayerShape, length: int, sinks: str | None = None) -> Figure:
    """The masks of all query heads of the layer `shape`, with density and coverage; `sinks` as in `lcpatch.apply`."""
    from matplotlib.figure import Figure

    def spec_of(shape: LayerShape) -> BlockSparseSpec:
        rules = with_sink_tokens(pattern.rules(shape), sinks)
        return BlockSparseSpec.of(rules, getattr(pattern, "block_size", 64))

    spec = spec_of(shape)
    columns = min(shape.num_heads, 4 if shape.num_heads <= 16 else 8)
    large = columns <= 4
    rows = math.ceil(shape.num_heads / columns)
    panel, across, down = (2.3, 0.25, 0.4) if large else (1.5, 0.2, 0.32)  # inches: a panel, the gaps between two
    left, right, top, bottom = 0.65, 1.0, 1.45, 0.5
    wide, high = columns * panel + (columns - 1) * across, rows * panel + (rows - 1) * down
    width, height = max(left + wide + right, 7.4), top + high + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=(left + wide) / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=across / panel,
        hspace=down / panel,
    )
    size = round(panel * DPI)  # one cell a pixel: a thin stripe neither vanishes nor doubles
    images = [shares(rule, spec.block_size, length, size) for rule in spec.rules]
    densities = [BlockSparseSpec.of([rule], spec.block_size).density(length) for rule in spec.rules]
    for head, rule in enumerate(spec.head_rules):
        row, column = divmod(head, columns)
        ax = figure.add_subplot(grid[row, column])
        drawn = draw_mask(ax, images[rule], length, keys=head + columns >= shape.num_heads, queries=column == 0)
        kv_head = head * shape.num_kv_heads // shape.num_heads
        title = f"head {head} · KV {kv_head} · {densities[rule]:.1%}" if large else f"head {head} · KV {kv_head}"
        ax.set_title(title, fontsize=8.5 if large else 7.5, color=INK, pad=4)
    bar = figure.add_axes(((left + wide + 0.2) / width, bottom / height, 0.1 / width, 1.2 / height))
    colour_bar(figure, drawn, bar, "share of pairs kept")

    density = spec.density(length)
    stack = [spec_of(replace(shape, rank=rank)) for rank in range(shape.num_sparse)]
    here, everywhere = coverage([spec], length), coverage(stack, length)
    heads = f"{tokens(length)} tokens · {shape.num_heads} heads over {shape.num_kv_heads} KV heads"
    layer, layers = f"this layer (number {shape.rank})", f"{shape.num_sparse} such layers together"
    lines = [
        (pattern.title, {"fontsize": 13, "weight": "bold"}),
        (f"{heads} · density {density:.1%} of causal pairs, so at best {1 / density:.1f}× faster", {"fontsize": 9}),
        (f"the last token sees {here:.0%} of the text in {layer}, {everywhere:.0%} in {layers}", {"fontsize": 9}),
        (", ".join(f"{k}={v!r}" for k, v in pattern.to_options().items()), {"fontsize": 8, "color": GREY}),
    ]
    for number, (line, style) in enumerate(lines):
        below = 0.3 + 0.23 * number + 0.04 * (number > 0)
        figure.text(left / width, 1 - below / height, line, va="center", **{"color": INK, **style})
    return figure
