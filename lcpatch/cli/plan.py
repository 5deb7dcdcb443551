"""`lcpatch plan MODEL --length N --gpu 80GB`: which ways to train fit, and how long a step will take."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ..core.markdown import table

if TYPE_CHECKING:
    from ..training.step_cost import Sizes


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("plan", help="predict memory and time of training a model on long rows")
    parser.add_argument("model", metavar="MODEL", help="a folder, an id on the Hub, or `demo`; only its config is read")
    parser.add_argument("--length", type=int, required=True, metavar="N", help="tokens of a row")
    parser.add_argument("--gpu", default="80GB", metavar="MEMORY", help="memory of the GPU (default 80GB)")
    parser.add_argument("--attention", default="full,sf,s2", metavar="A,B", help="arms (default full,sf,s2)")
    parser.add_argument("--tune", default="lora+", choices=["lora+", "lora", "full"], help="default lora+")
    parser.add_argument("--ranks", type=int, metavar="N", help="also say how N GPUs would share a row's attention")
    parser.add_argument(
        "--bandwidth", type=float, default=50.0, metavar="GB/S", help="that a GPU sends to others with (default 50)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    gib = _memory(args.gpu)
    if args.length < 2:
        raise ValueError(f"--length {args.length} must be at least 2 tokens")
    if args.ranks is not None and not (1 <= args.ranks <= args.length and args.bandwidth > 0):
        raise ValueError(f"--ranks {args.ranks} must be 1 to {args.length}, and --bandwidth {args.bandwidth} above 0")
    from transformers import AutoConfig

    from ..training.model import resolve
    from ..training.plan import plan

    config = AutoConfig.from_pretrained(resolve(args.model))
    found = plan(config, args.length, gib, attentions=args.attention.split(","), tune=args.tune)
    header = ("Attention", "Peak GiB", "Fits", "s a step", "Flags of lcpatch train")
    cells = [
        (r.name, f"{r.gib:.1f}", "yes" if r.fits else "no", f"{r.seconds:.2f}", f"`{r.flags}`") for r in found.rows
    ]
    print(table(header, cells))
    fitting = [row for row in found.rows if row.fits]
    if fitting:
        best = min(fitting, key=lambda row: row.seconds)  # of equals the first, which is the simplest
        print(f"\nFastest that fits {args.gpu}: {best.flags} --tune {args.tune} --length {args.length}")
    else:
        print(f"\nNothing fits {args.gpu}: take shorter rows, --tune lora, or --quantize 4bit")
    print(
        "One row a step, bf16, checkpointing. Times are an H100's; measured there within 10 % for dense and S2, by "
        "chunks too; the formula's word for the rest."
    )
    if found.why_no_chunks:
        print(f"Not by chunks (--chunk-size): {found.why_no_chunks}.")
    if found.window:
        print(
            f"Layers with a window take the time of its {found.window} tokens, as --dense flash_attention_2 does; sdpa "
            "computes them as dense ones."
        )
    if args.ranks is not None:
        _over_ranks(args, config.get_text_config(), found.sizes)


def _over_ranks(args: argparse.Namespace, config: Any, sizes: Sizes) -> None:
    """Print which strategy of `training.parallel` each arm's layers take."""
    from lcpatch_kernels import DENSE, BlockSparseSpec

    from ..hf.layers import shape_of
    from ..patching.resolve import pattern_of
    from ..training.arms import patch_for
    from ..training.parallel.cost import Rates, choose_for

    shape = shape_of(config, 0, config.num_hidden_layers)
    head_dim = sizes.attention // shape.num_heads
    rates = Rates(bandwidth=args.bandwidth * 1e9)
    print(
        f"\nOne layer's attention over {args.ranks} GPUs of {args.bandwidth:g} GB/s, by the bytes that its plan sends:"
    )
    for arm in args.attention.split(","):
        patch = patch_for(arm)
        dense = patch.mode == "never"
        spec = BlockSparseSpec.of([DENSE] * shape.num_heads) if dense else pattern_of(patch).spec(shape)
        choice = choose_for(spec, shape.num_kv_heads, head_dim, args.length, args.ranks, rates)
        print(f"{arm}: {choice.name}, {choice.why}")


def _memory(text: str) -> float:
    """GiB of "80GB", "80" or "0.5TB": cards are sold by the GB of 2^30 bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GI?B|TI?B)?", text.strip().upper())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--gpu {text!r} must be its memory, such as 80GB")
    return float(found[1]) * (1024 if (found[2] or "G").startswith("T") else 1)
