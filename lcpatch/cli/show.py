"""`lcpatch show METHOD`: a picture of the mask of every head of one layer, at any length."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from ._options import HINT


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
    from ..patching.picture import DPI, draw
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


def _check(args: argparse.Namespace, kv_heads: int) -> None:
    for name in ("length", "heads", "num_layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if kv_heads < 1 or args.heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads} must divide --heads {args.heads}")
    if not 0 <= args.layer < args.num_layers:
        raise ValueError(f"--layer {args.layer} must lie in 0 … {args.num_layers - 1}")
