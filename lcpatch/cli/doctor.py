"""`lcpatch doctor MODEL`: what each layer will run and why, and the silent traps that this model and machine are in."""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path
from typing import Any

from ._options import HINT


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help="say what each layer of a model runs, and find traps", epilog=HINT)
    parser.add_argument("model", metavar="MODEL", help="a folder, an id on the Hub, or `demo`")
    parser.add_argument("--method", metavar="METHOD", help="patch it with this method, or .yaml or .json file")
    parser.add_argument("--length", type=int, metavar="N", help="the longest sequence it is meant for, in tokens")
    parser.set_defaults(run=run, takes_options=True)


def run(args: argparse.Namespace) -> None:
    if args.options and not args.method:
        raise ValueError(f"--{next(iter(args.options))} is an option of a method; say which with --method")
    from ..patching import apply
    from ..patching.doctor import check, environment

    model, tokenizer = _load(args.model)
    findings = environment()
    if args.method:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apply(model, args.method, **args.options)
        findings += [str(warning.message) for warning in caught]
    findings += check(model, tokenizer, args.length)
    if tokenizer is None:
        findings.append("no tokenizer was found, so padding and truncation were not looked at")
    print("\n".join([*_header(args.model, model), "", *_layers(model), "", *_warnings(findings)]))


def _load(name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..hf.demo_model import demo_model

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"{name} is no folder with a model in it")
    logging.disable_progress_bar()
    folder = demo_model() if name == "demo" else Path(name).expanduser() if name.startswith("~") else name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # said by `run`
        tokenizer = None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _header(name: str, model: Any) -> list[str]:
    from .. import __version__
    from ..hf.layers import shape_of
    from ..patching.doctor import SUPPORTED, installed

    heads = shape_of(model.config, 0, 1)
    packages = [f"{package} {found}" for package in SUPPORTED if (found := installed(package))]
    shape = f"{model.config.model_type}, {heads.num_heads} heads over {heads.num_kv_heads} KV heads"
    where = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    return [f"{name}: {shape}, {where}", f"lcpatch {__version__}, {', '.join(packages)}"]


def _layers(model: Any) -> list[str]:
    """The layers while the model is used and, where that differs, while it trains."""
    evaluating, training = _grouped(model.eval()), _grouped(model.train())
    model.eval()
    if evaluating == training:
        return evaluating
    return ["evaluating and generating:", *evaluating, "training:", *training]


def _grouped(model: Any) -> list[str]:
    from ..patching import report
    from ..patching.doctor import spans

    groups: dict[tuple[str, ...], list[int]] = {}
    for row in report(model):
        pattern = "dense" if row.method is None else f"{row.method} ({row.mode})"
        groups.setdefault((row.kind, pattern, row.runs, row.why), []).append(row.index)
    rows = [(f"layers {spans(indices)}", *facts) for facts, indices in groups.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _warnings(findings: list[str]) -> list[str]:
    if not findings:
        return ["No warnings."]
    lines = [f"{len(findings)} warning{'s' * (len(findings) > 1)}:"]
    for finding in findings:
        lines += textwrap.wrap(finding, 110, initial_indent="  - ", subsequent_indent="    ")
    return lines
