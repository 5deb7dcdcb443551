"""`lcpatch bench`: speed beside the peers, refused where a result is wrong."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from . import _benchmarks
from ._options import count, counts


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="measure speed beside the peers (needs a GPU)", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_kernels(what)
    _add_models(what)
    for verb in what.choices.values():
        verb.add_argument("--out", type=Path, help="write the results here as JSON, row by row; replaces a file")
        verb.add_argument("--commit", help="commit to record; default: this checkout's")
    for verb in map(what.choices.get, ("model", "cache", "training")):
        verb.add_argument(
            "--append",
            action="store_true",
            help="keep what --out holds and this run does not measure; rows name their commit where it is another",
        )
    _add_tables(what)
    parser.set_defaults(run=run)


def _add_kernels(what: argparse._SubParsersAction) -> None:
    """One layer's attention."""
    attention = what.add_parser("attention", help="our kernel beside FA2, cuDNN and FlexAttention")
    attention.add_argument("--no-peers", action="store_true", help="leave FlexAttention and grouped cuDNN out")
    attention.set_defaults(measure=_benchmarks.attention, lengths=(8192, 32768, 131072))
    shapes = what.add_parser("shapes", help="one pattern over head dims and head counts")
    shapes.set_defaults(measure=_benchmarks.shapes, lengths=(8192, 16384, 32768))
    tune = what.add_parser("tune", help="the fastest tiles of each kernel on this GPU")
    tune.add_argument("--kernels", default="fwd,dq,dkdv", help="comma-separated, of fwd, dq, dkdv and mass")
    tune.set_defaults(measure=_benchmarks.tune, lengths=(32768,))
    decode = what.add_parser("decode", help="one decode step beside dense decoding")
    decode.add_argument("--batches", type=counts, default=(1, 8), help="batch sizes, comma-separated (default 1,8)")
    decode.set_defaults(measure=_benchmarks.decode, lengths=(8192, 32768, 131072))
    parallel = what.add_parser("parallel", help="the bytes that context parallelism sends (needs no GPU), and its time")
    parallel.add_argument("--ranks", type=count, default=8, help="ranks to count for (default 8)")
    parallel.add_argument(
        "--time", action="store_true", help="instead, time every strategy: under torchrun, a GPU for each rank"
    )
    parallel.add_argument(
        "--step", action="store_true", help="instead, time a training step of an 8B model on one GPU and on all"
    )
    parallel.set_defaults(measure=_benchmarks.parallel, lengths=(131072,))
    for verb in (attention, shapes, tune, decode, parallel):
        verb.add_argument("--lengths", type=counts, help="tokens, comma-separated")
    for verb in (attention, tune, decode, parallel):
        verb.add_argument("--heads", type=count, default=32, help="query heads (default 32)")
        verb.add_argument("--kv-heads", type=count, default=8, help="KV heads (default 8)")
        verb.add_argument("--head-dim", type=count, default=128, help="head dim (default 128)")
    for verb in (attention, tune, decode):
        verb.add_argument("--patterns", help="comma-separated names out of the default set (see the output's column)")
    for verb in (attention, tune):
        verb.add_argument("--batch", type=count, default=1, help="batch size (default 1)")


def _add_models(what: argparse._SubParsersAction) -> None:
    """A whole model."""
    model = what.add_parser("model", help="a whole 8B model: prefill, a LoRA training step, decoding")
    model.add_argument(
        "--tasks", default="prefill:32768,prefill:131072,train:32768,decode:131072", help="task:tokens, …"
    )
    model.set_defaults(measure=_benchmarks.model)
    training = what.add_parser("training", help="a LoRA step of a long text: sparse against dense, SeCO, SpaCO")
    training.add_argument(
        "--part",
        default="a,b,c,d,e",
        help="a: sparse against dense, b: memory slope, c: SeCO's time, d: SpaCO's, e: the longest, f: one real step "
        "under S2, g: a dense one",
    )
    training.add_argument("--length", type=count, help="tokens of parts f and g (default 204800)")
    training.add_argument("--offload", action="store_true", help="parts f and g with keys and values in host memory")
    training.add_argument("--tiny", action="store_true", help="a small model on the CPU: tries the benchmark itself")
    training.set_defaults(measure=_benchmarks.training)
    cache = what.add_parser(
        "cache", help="caches of a whole 8B model beside those of others: prefill, memory, decoding"
    )
    cache.add_argument("--tasks", default="1:32768,1:131072,8:32768", help="batch:tokens, …")
    cache.add_argument("--arms", help="names of arms, separated by semicolons (default: all; a wrong one lists them)")
    cache.add_argument(
        "--limit", type=_seconds, default=300, help="seconds after which an arm is given up (default 300)"
    )
    cache.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: runs anywhere, times say nothing")
    cache.set_defaults(measure=_benchmarks.cache)
    for verb in (model, cache):
        verb.add_argument("--layers", type=count, help="layers of the model (default 32)")


def _add_tables(what: argparse._SubParsersAction) -> None:
    tables = what.add_parser("tables", help="committed results as Markdown tables and a plot")
    tables.add_argument("results", nargs="+", type=Path, help="JSON files that `lcpatch bench` wrote")
    target = tables.add_mutually_exclusive_group()
    target.add_argument("--write", type=Path, metavar="README", help="put each table between this file's markers")
    target.add_argument("--check", type=Path, metavar="README", help="fail if this file's tables are out of date")
    tables.add_argument("--plot", type=Path, metavar="PNG", help="draw the attention result")
    tables.set_defaults(measure=None)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the JSON if asked."""
    if args.measure is None:
        return _tables(args)
    args.record = None
    try:
        args.measure(args)
    finally:  # what was measured outlives an error or Ctrl-C, which says the rest
        if args.record is not None and args.record.is_written:
            print(f"written to {args.out}")
    return 0


def _tables(args: argparse.Namespace) -> int:
    from ..bench import record, tables
    from ..core.markdown import table, with_block

    kinds = [path.name.split("-")[0] for path in args.results]
    for kind, path in zip(kinds, args.results, strict=True):
        if kind not in tables.KINDS:
            raise ValueError(f"{path}: its name must start with its kind, one of {', '.join(tables.KINDS)}")
    if args.plot and "attention" not in kinds:
        raise ValueError(f"--plot {args.plot} draws the result of `lcpatch bench attention`, and none is given")
    for kind, path in zip(kinds, args.results, strict=True):
        result = record.read(path)
        try:
            text = f"{table(*tables.KINDS[kind](result))}\n\n{tables.provenance(result)}"
        except KeyError as error:
            raise ValueError(
                f"{path} is no result of the kind that its name says, {kind}: it has no {error}"
            ) from error
        if args.write:
            args.write.write_text(with_block(args.write, f"bench-{kind}", text), encoding="utf-8")
        elif args.check and with_block(args.check, f"bench-{kind}", text) != args.check.read_text(encoding="utf-8"):
            print(f"the {kind} table of {args.check} is out of date: lcpatch bench tables … --write", file=sys.stderr)
            return 1
        elif not args.check:
            print(text)
        if args.plot and kind == "attention":
            tables.plot(result, args.plot)
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
