"""`lcpatch eval MODEL`: what a method or a cache costs, on identical samples, as a report for the model card."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._load import load_model
from ._options import counts, describe, parse_options

if TYPE_CHECKING:
    from ..eval import Arm

HINT = (
    "Options of tasks, METHOD and cache follow as `--name value`: `--digits 7 --local-blocks 8 --budget 0.2`. "
    "Beside the method or cache the model is also measured as it is."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="measure a model with and without a method or cache", epilog=HINT)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, an id on the Hub, or `demo`")
    parser.add_argument("--list", action="store_true", help="list the tasks with their options")
    parser.add_argument("--tasks", type=_names, default=["perplexity"], metavar="A,B", help="default: perplexity")
    parser.add_argument("--lengths", type=counts, default=[4096], metavar="N,N", help="in tokens (default 4096)")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--method", metavar="METHOD", help="patch the model with this method")
    what.add_argument("--cache", metavar="CACHE", help="keep its past in this cache")
    what.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="ARM",
        help="one more: 'METHOD --option value --cache CACHE --option value', either part optional; repeatable",
    )
    what.add_argument("--no-dense", action="store_true", help="leave the model as it is out")
    what.add_argument("--chunk", type=int, metavar="N", help="read contexts N tokens at a time")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--text",
        nargs="+",
        metavar="NAME",
        help="files, folders, .jsonl and .parquet tables, hub:NAME@SPLIT (default: Python's manual)",
    )
    how.add_argument("--text-field", default="text", metavar="FIELD", help="of a table's records (default: text)")
    how.add_argument("--records", type=int, default=256, metavar="N", help="of each table, at most (default 256)")
    how.add_argument("--seeds", type=int, default=3, metavar="N", help="samples per cell (default 3)")
    how.add_argument("--score", choices=["generate", "rank", "both"], default="both", help="default: both")
    how.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    how.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the model was saved")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="candidates at once (default 8)")
    how.add_argument("--beyond", action="store_true", help="allow lengths beyond the model's positions")
    how.add_argument(
        "--out", type=Path, metavar="FOLDER", help="results, report and pictures; a killed run goes on there"
    )
    parser.set_defaults(run=run, takes_options=True)


def run(args: argparse.Namespace) -> None:
    if args.list:
        print(_tasks())
        return
    if args.model is None:
        raise ValueError("say which MODEL: a folder, an id on the Hub, or `demo`")
    for name in ("seeds", "batch_size", "records"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    from ..eval import evaluate
    from ..eval.run import make_tasks
    from ..eval.text import read_documents

    arms, options = _arms(args)
    make_tasks(args.tasks, options)  # what is wrong is said before the model loads
    documents, source = read_documents(args.text, args.text_field, args.records)
    model, tokenizer = load_model(args.model, args.dtype)
    report = evaluate(
        model,
        tokenizer,
        args.tasks,
        args.lengths,
        arms=arms,
        documents=documents,
        source=source,
        seeds=args.seeds,
        score=args.score,
        chat=args.chat,
        options=options,
        batch_size=args.batch_size,
        beyond=args.beyond,
        out=args.out,
        name=args.model,
    )
    report = replace(report, command=args.command)
    print(report.markdown())
    if args.out:
        print("written: " + ", ".join(map(str, report.save(args.out))))


def _arms(args: argparse.Namespace) -> tuple[list[Arm], dict[str, Any]]:
    """What is compared, and the options that are left for the tasks."""
    from ..eval import Arm
    from ..eval.arms import sort_options

    method = None if args.method == "dense" else args.method
    of_method, of_cache, rest = sort_options(args.options, method, args.cache)
    arms = [] if args.no_dense else [Arm(chunk=args.chunk)]
    if method or args.cache:
        arms.append(Arm(method, of_method, args.cache, of_cache, args.chunk))
    arms += [Arm.parse(text, parse_options, args.chunk) for text in args.arm]
    if not arms:
        raise ValueError("--no-dense leaves nothing to measure: add --method, --cache or --arm")
    return arms, rest


def _tasks() -> str:
    from ..eval import tasks

    lines = []
    for name, cls in tasks.all().items():
        suite = f", of {cls.suite}" if cls.suite else ""
        options = describe({f: p.default for f, p in inspect.signature(cls).parameters.items()})
        lines += [f"{name:18}{cls.title}{suite}   https://arxiv.org/abs/{cls.source}", f"{'':18}{options}".rstrip(), ""]
    return "\n".join(lines).rstrip()


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
