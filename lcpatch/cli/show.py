"""`lcpatch show METHOD`: a picture of the mask of every head of one layer, at any length."""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._options import HINT, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..patterns import AttentionPattern, LayerShape


DPI = 150


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("show", help="draw the mask of every head of a method", epilog=HINT)
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens (default 4096)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (default 8)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: a quarter, or all)")
    parser.add_argument("--num-layers", type=int, default=32, metavar="N", help="sparse layers (default 32)")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="which of them to draw (default 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default METHOD.png)")
    parser.set_defaults(run=run, takes_options=True)


def run(args: argparse.Namespace) -> None:
    from ..patterns import LayerShape, patterns

    kv_heads = args.kv_heads or (args.heads // 4 if args.heads % 4 == 0 else args.heads)
    _check(args, kv_heads)
    pattern = patterns.get(args.method).from_options(args.options)
    shape = LayerShape(args.heads, kv_heads, args.layer, args.num_layers)
    out = args.out or Path(f"{args.method}.png")
    draw(pattern, shape, args.length).savefig(out, dpi=DPI)
    for message in pattern.warnings(shape):
        warnings.warn(message, stacklevel=1)
    print(f"{out}: {args.method} at {args.length} tokens, density {pattern.spec(shape).density(args.length):.1%}")


def draw(pattern: AttentionPattern, shape: LayerShape, length: int) -> Figure:
    """The masks of all query heads of the layer `shape`, with density and coverage."""
    from matplotlib.figure import Figure

    from lcpatch_kernels import BlockSparseSpec

    from ._draw import GREY, INK, colour_bar, coverage, draw_mask, shares, tokens

    spec = pattern.spec(shape)
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
    stack = [pattern.spec(replace(shape, rank=rank)) for rank in range(shape.num_sparse)]
    here, everywhere = coverage([spec], length), coverage(stack, length)
    heads = f"{tokens(length)} tokens · {shape.num_heads} heads over {shape.num_kv_heads} KV heads"
    layer, layers = f"this layer (number {shape.rank})", f"{shape.num_sparse} such layers together"
    lines = [
        (pattern.title, {"fontsize": 13, "weight": "bold"}),
        (f"{heads} · density {density:.1%} of causal pairs, so at best {1 / density:.1f}× faster", {"fontsize": 9}),
        (f"the last token sees {here:.0%} of the text in {layer}, {everywhere:.0%} in {layers}", {"fontsize": 9}),
        (describe(pattern.to_options()), {"fontsize": 8, "color": GREY}),
    ]
    for number, (line, style) in enumerate(lines):
        below = 0.3 + 0.23 * number + 0.04 * (number > 0)
        figure.text(left / width, 1 - below / height, line, va="center", **{"color": INK, **style})
    return figure


def _check(args: argparse.Namespace, kv_heads: int) -> None:
    for name in ("length", "heads", "num_layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if kv_heads < 1 or args.heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads} must divide --heads {args.heads}")
    if not 0 <= args.layer < args.num_layers:
        raise ValueError(f"--layer {args.layer} must lie in 0 … {args.num_layers - 1}")
