"""`lcpatch demo`: a real pretrained model on real text, dense and under every method, in a table and a picture."""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.text import read_texts
from ._options import describe

if TYPE_CHECKING:
    import torch

    from ._compare import Arm

MIN_LENGTH = 64


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="run a real model under every method, on this machine, in minutes")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to read (default: Python's own documentation)")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of it (default 4096)")
    parser.add_argument("--methods", metavar="A,B", help="which methods (default: all that are registered)")
    parser.add_argument("--out", type=Path, default="lcpatch-demo.png", metavar="FILE", help="picture to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if args.length < MIN_LENGTH:
        raise ValueError(f"--length {args.length} must be at least {MIN_LENGTH} tokens")
    (text,), source = read_texts(args.text and [args.text])
    methods = _methods(args.methods)
    from ..hf.demo_model import demo_model

    model, tokenizer = load(demo_model())
    input_ids = encode(tokenizer, text, args.length, source).to(model.device)
    name = f"SmolLM2-135M-Instruct, {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    print(f"{name}: {args.length} tokens of {source}\n")
    arms = show(model, tokenizer, input_ids, methods, args.out, f"SmolLM2-135M on {args.length} tokens of {source}")
    print(f"\n{closing(arms, model.device.type)}\n\npicture: {args.out}   ({time.perf_counter() - start:.0f} s)")


def show(
    model: Any, tokenizer: Any, input_ids: torch.Tensor, methods: Sequence[str], out: Path, title: str
) -> list[Arm]:
    """Compare, print the table, save the picture."""
    from ._compare import compare
    from ._demo_picture import draw

    arms = compare(model, tokenizer, input_ids, methods)
    print(table(arms))
    draw(arms, title).savefig(out, dpi=150)
    return arms


def encode(tokenizer: Any, text: str, length: int, source: str) -> torch.Tensor:
    """The first `length` tokens of `text`, [1, length].

    Raises:
        ValueError: the text is shorter than that.
    """
    for part in (text[: 16 * length], text):  # the beginning nearly always does, and tokenizing a novel takes a while
        ids = tokenizer(part, return_tensors="pt", verbose=False).input_ids[:, :length]
        if ids.shape[1] == length:
            return ids
    raise ValueError(f"{source} has {ids.shape[1]} tokens, not {length}: take a longer text or a shorter --length")


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, on a GPU if there is one, in the dtype that is fast here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_fast_dtype(device)).to(device).eval()
    return model, tokenizer


def table(arms: Sequence[Arm]) -> str:
    """The arms as text, two lines or more each: numbers, then what the model writes next."""
    from ..eval import perplexity

    quarter = (len(arms[0].nll) + 1) // 4
    lines = [f"{'method':8}{'density':>8}{'perplexity':>12}{f'last {quarter}':>11}{'time':>9}   options"]
    for arm in arms:
        numbers = f"{perplexity(arm.nll):12.2f}{perplexity(arm.nll[-quarter:]):11.2f}{arm.seconds:7.1f} s"
        lines.append(f"{arm.name:8}{arm.density:8.1%}{numbers}   {describe(arm.options)}".rstrip())
        text = f"… {arm.continuation.strip()}".replace("\n", "⏎")
        lines += textwrap.wrap(text, 88, initial_indent=" " * 8, subsequent_indent=" " * 10)
    return "\n".join(lines)


def closing(arms: Sequence[Arm], device: str) -> str:
    """How to read the table."""
    from ..patterns import patterns

    lines = ["Indented: what the model writes next, greedily. Nothing was trained here."]
    tuned = [arm.name for arm in arms[1:] if patterns.get(arm.name).default_mode == "train"]
    if tuned:
        lines.append(
            f"{' and '.join(tuned)}: made to train sparse and then run dense; untrained and sparse is their worst case."
        )
    if device == "cpu" and len(arms) > 1:
        lines.append("Time: on a CPU a pattern runs in plain torch, tile by tile; the Triton kernels are for GPUs.")
    return "\n".join(lines)


def _methods(given: str | None) -> list[str]:
    from ..patterns import patterns

    names = list(patterns.all()) if given is None else [name.strip() for name in given.split(",") if name.strip()]
    return list(dict.fromkeys(name for name in names if name != "dense" and patterns.get(name)))


def _fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where it is faster than float32, measured: a CPU without instructions for it is several times slower."""
    import torch

    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])
