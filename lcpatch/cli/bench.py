"""`lcpatch bench`: speed beside the peers, refused where a result is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="measure speed beside the peers (needs a GPU)", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    attention = what.add_parser("attention", help="our kernel beside FA2, cuDNN and FlexAttention")
    attention.add_argument("--no-peers", action="store_true", help="leave FlexAttention and grouped cuDNN out")
    attention.set_defaults(measure=_attention, lengths=(8192, 32768, 131072))
    shapes = what.add_parser("shapes", help="one pattern over head dims and head counts")
    shapes.add_argument("--lengths", type=_lengths, help="tokens, comma-separated")
    shapes.set_defaults(measure=_shapes, lengths=(8192, 16384, 32768))
    tune = what.add_parser("tune", help="the fastest tiles of each kernel on this GPU")
    tune.add_argument("--kernels", default="fwd,dq,dkdv", help="comma-separated, of fwd, dq, dkdv and mass")
    tune.set_defaults(measure=_tune, lengths=(32768,))
    decode = what.add_parser("decode", help="one decode step beside dense decoding")
    decode.add_argument("--batches", type=_lengths, default=(1, 8), help="batch sizes, comma-separated (default 1,8)")
    decode.set_defaults(measure=_decode, lengths=(8192, 32768, 131072))
    model = what.add_parser("model", help="a whole 8B model: prefill, a LoRA training step, decoding")
    model.add_argument(
        "--tasks", default="prefill:32768,prefill:131072,train:32768,decode:131072", help="task:tokens, …"
    )
    model.add_argument("--layers", type=int, default=32, help="layers of the model (default 32)")
    model.set_defaults(measure=_model)
    parallel = what.add_parser("parallel", help="the bytes that context parallelism sends (needs no GPU), and its time")
    parallel.add_argument("--ranks", type=int, default=8, help="ranks to count for (default 8)")
    parallel.add_argument(
        "--time", action="store_true", help="instead, time every strategy: under torchrun, a GPU for each rank"
    )
    parallel.set_defaults(measure=_parallel, lengths=(131072,))
    training = what.add_parser("training", help="a LoRA step of a long text: sparse against dense, SeCO, SpaCO")
    training.add_argument(
        "--part",
        default="a,b,c,d,e",
        help="a: sparse against dense, b: memory slope, c: SeCO's time, d: SpaCO's, e: the longest, f: one real step "
        "under S2, g: a dense one",
    )
    training.add_argument("--length", type=int, help="tokens of parts f and g (default 204800)")
    training.add_argument("--offload", action="store_true", help="parts f and g with keys and values in host memory")
    training.add_argument("--tiny", action="store_true", help="a small model on the CPU: tries the benchmark itself")
    training.set_defaults(measure=_training)
    cache = what.add_parser(
        "cache", help="caches of a whole 8B model beside those of others: prefill, memory, decoding"
    )
    cache.add_argument("--tasks", default="1:32768,1:131072,8:32768", help="batch:tokens, …")
    cache.add_argument("--arms", help="names of arms, separated by semicolons (default: all)")
    cache.add_argument("--layers", type=int, default=32, help="layers of the model (default 32)")
    cache.add_argument("--limit", type=float, default=300, help="seconds after which an arm is given up (default 300)")
    cache.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: runs anywhere, times say nothing")
    cache.set_defaults(measure=_cache)
    tables = what.add_parser("tables", help="committed results as Markdown tables and a plot")
    tables.add_argument("results", nargs="*", type=Path, help="JSON files that `lcpatch bench` wrote")
    tables.add_argument("--write", type=Path, metavar="README", help="put each table between this file's markers")
    tables.add_argument("--check", type=Path, metavar="README", help="fail if this file's tables are out of date")
    tables.add_argument("--plot", type=Path, metavar="PNG", help="draw the attention result")
    tables.set_defaults(measure=None)
    for verb in (attention, tune, decode, parallel):
        verb.add_argument("--lengths", type=_lengths, help="tokens, comma-separated")
        verb.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
        verb.add_argument("--kv-heads", type=int, default=8, help="KV heads (default 8)")
        verb.add_argument("--head-dim", type=int, default=128, help="head dim (default 128)")
    for verb in (attention, tune, decode):
        verb.add_argument("--patterns", help="comma-separated names out of the default set (see the output's column)")
        if verb is not decode:
            verb.add_argument("--batch", type=int, default=1, help="batch size (default 1)")
    for verb in (attention, shapes, tune, decode, model, cache, training, parallel):
        verb.add_argument("--out", type=Path, help="write the results here as JSON")
        verb.add_argument("--commit", help="commit to record; default: this checkout's")
    for verb in (model, cache, training):
        verb.add_argument(
            "--append",
            action="store_true",
            help="keep what --out holds and this run does not measure; rows name their commit where it is another",
        )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the JSON if asked."""
    if args.measure is None:
        return _tables(args)
    args.keep = _keep(args)
    result = args.measure(args)
    if args.out and result:  # of several processes one has the result
        args.keep(result)
        print(f"written to {args.out}")
    return 0


def _keep(args: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Writes what there is of a result: minutes of work outlive an interruption."""
    from ..bench import measure

    earlier = None
    if args.out and getattr(args, "append", False) and args.out.exists():
        earlier = _read(args.out)
        measure.with_earlier(measure.environment(args.commit), earlier)  # refused before anything is measured

    def keep(result: dict[str, Any]) -> None:
        if args.out:
            measure.write(measure.with_earlier(result, earlier) if earlier else result, args.out)

    return keep


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result of `lcpatch bench`: {error}") from error


def _cases_and_shape(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from ..bench import attention

    cases = attention.cases()
    wanted = args.patterns.split(",") if args.patterns else list(cases)
    if unknown := [name for name in wanted if name not in cases]:
        raise ValueError(f"--patterns: {unknown[0]!r} is not one of {', '.join(cases)}")
    shape = attention.Shape(getattr(args, "batch", 1), args.heads, args.kv_heads, args.head_dim)
    return {name: cases[name] for name in wanted}, shape


def _attention(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import attention

    cases, shape = _cases_and_shape(args)

    return attention.run(args.lengths, cases, shape, peers=not args.no_peers, commit=args.commit, keep=args.keep)


def _shapes(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import attention

    return attention.run_shapes(args.lengths, commit=args.commit)


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import decode

    cases, shape = _cases_and_shape(args)
    steps = {name: pattern for name, pattern in cases.items() if not pattern.follows_length}
    return decode.run(args.lengths, args.batches, steps, shape, commit=args.commit)


def _parallel(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import attention, parallel

    shape = attention.Shape(1, args.heads, args.kv_heads, args.head_dim)
    if args.time:
        from ..bench import parallel_time

        return parallel_time.run(args.lengths, shape, commit=args.commit)
    return parallel.run(args.lengths, args.ranks, shape, commit=args.commit)


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import model

    tasks = []
    for part in args.tasks.split(","):
        task, _, length = part.partition(":")
        if task not in ("prefill", "train", "decode") or not length.isdigit():
            raise ValueError(f"--tasks: {part!r} is not prefill:TOKENS, train:TOKENS or decode:TOKENS")
        tasks.append((task, int(length)))
    return model.run(tuple(tasks), args.layers, commit=args.commit, keep=args.keep)


def _training(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from ..bench import training

    parts = args.part.split(",")
    if unknown := [part for part in parts if part not in training.PARTS]:
        raise ValueError(f"--part: {unknown[0]!r} is not one of {', '.join(training.PARTS)}")
    setup = training.TINY if args.tiny else training.Setup()
    full = (args.length or setup.full[0], args.offload or (args.length is None and setup.full[1]))
    return training.run("".join(parts), replace(setup, full=full), commit=args.commit, keep=args.keep)


def _cache(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import cache, geometry

    tasks = []
    for part in args.tasks.split(","):
        batch, _, length = part.partition(":")
        if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
            raise ValueError(f"--tasks: {part!r} is not BATCH:TOKENS, as in 1:32768")
        tasks.append((int(batch), int(length)))
    shape = geometry.TINY if args.tiny else {**geometry.LLAMA_8B, "num_hidden_layers": args.layers}
    arms = None if args.arms is None else tuple(name.strip() for name in args.arms.split(";"))
    small = {"device": "cpu", "chunk": 64} if args.tiny else {}
    return cache.run(tuple(tasks), shape, arms=arms, commit=args.commit, keep=args.keep, limit_s=args.limit, **small)


def _tables(args: argparse.Namespace) -> int:
    from ..bench import tables
    from ..core.markdown import table, with_block

    for path in args.results:
        kind = path.name.split("-")[0]
        if kind not in tables.KINDS:
            raise ValueError(f"{path}: its name must start with its kind, one of {', '.join(tables.KINDS)}")
        result = _read(path)
        text = f"{table(*tables.KINDS[kind](result))}\n\n{tables.provenance(result)}"
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


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import measure, tune

    cases, shape = _cases_and_shape(args)
    kernels = tuple(args.kernels.split(","))
    rows = [row for length in args.lengths for row in tune.run(kernels, tuple(cases), shape, length)]
    return {**measure.environment(args.commit), "rows": rows}


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(part) for part in text.split(","))
    if any(n < 1 for n in lengths):
        raise argparse.ArgumentTypeError(f"lengths must be positive; got {text}")
    return lengths
