"""What `lcpatch bench` calls, from its options: each benchmark, its sizes, and the file that it keeps its rows in.

What is wrong with an option is said before a GPU is asked for: a command that only lacks one on this machine runs on
one that has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.choices import chosen
from ._options import is_count

Result = dict[str, Any]


def attention(args: argparse.Namespace) -> Result:
    from ..bench import attention

    found, shape = _cases(args), _shape(args)
    return attention.run(args.lengths, found, shape, peers=not args.no_peers, **_how(args))


def shapes(args: argparse.Namespace) -> Result:
    from ..bench import attention

    return attention.run_shapes(args.lengths, **_how(args))


def tune(args: argparse.Namespace) -> Result:
    from ..bench import tune
    from ..bench.environment import environment

    kernels = tuple(chosen("--kernels", _words(args.kernels), tune.KERNELS))
    found, shape = tuple(_cases(args)), _shape(args)
    how, result = _how(args), {**environment(args.commit), "rows": []}
    for length in args.lengths:
        result["rows"] += tune.run(kernels, found, shape, length, how["say"])
        how["keep"](result)
    return result


def decode(args: argparse.Namespace) -> Result:
    from ..bench import decode

    steps = {name: pattern for name, pattern in _cases(args).items() if not pattern.follows_length}
    if not steps:
        raise ValueError(f"--patterns {args.patterns}: groups that are a share of the length have no next token")
    return decode.run(args.lengths, args.batches, steps, _shape(args), **_how(args))


def parallel(args: argparse.Namespace) -> Result:
    from ..bench import parallel, parallel_step, parallel_time

    if args.time and args.step:
        raise ValueError("--time and --step are two runs, each with a file of its own: give one of them")
    shape, how = _shape(args), _how(args)
    if args.step:
        result = parallel_step.run(args.lengths, args.commit, how["say"], how["keep"])
    elif args.time:
        result = parallel_time.run(args.lengths, shape, args.commit)
    else:
        result = parallel.run(args.lengths, args.ranks, shape, args.commit, how["say"])
    if result:  # of several processes one has it
        how["keep"](result)
    return result


def model(args: argparse.Namespace) -> Result:
    from ..bench import model
    from ..bench.geometry import LLAMA_8B

    def task(word: str) -> tuple[str, int]:
        name, _, length = word.partition(":")
        if name not in model.TASKS or not is_count(length):
            raise ValueError(f"--tasks: {word!r} is not {', '.join(f'{t}:TOKENS' for t in model.TASKS)}")
        return name, int(length)

    tasks = _tasks(args.tasks, task)
    geometry = {**LLAMA_8B, "num_hidden_layers": args.layers or LLAMA_8B["num_hidden_layers"]}
    return model.run(tasks, geometry["num_hidden_layers"], **_how(args, model.place, geometry=geometry))


def training(args: argparse.Namespace) -> Result:
    from dataclasses import replace

    from ..bench import training
    from ..bench.training_setup import TINY, Setup

    parts = chosen("--part", _words(args.part), training.PARTS)
    if (args.length or args.offload) and not {*parts} & {*training.FULL}:
        raise ValueError(f"--length and --offload are for parts {' and '.join(training.FULL)}, and --part has neither")
    setup = TINY if args.tiny else Setup()
    setup = replace(setup, full=args.length or setup.full, full_offloaded=args.offload or setup.full_offloaded)
    return training.run(parts, setup, **_how(args, training.place, geometry=setup.geometry))


def cache(args: argparse.Namespace) -> Result:
    from ..bench import cache
    from ..bench.geometry import LLAMA_8B, TINY

    def task(word: str) -> tuple[int, int]:
        batch, _, length = word.partition(":")
        if not (is_count(batch) and is_count(length)):
            raise ValueError(f"--tasks: {word!r} is not BATCH:TOKENS, as in 1:32768")
        return int(batch), int(length)

    tasks = _tasks(args.tasks, task)
    arms = None if args.arms is None else tuple(_words(args.arms, ";"))
    geometry = dict(TINY if args.tiny else LLAMA_8B)
    geometry["num_hidden_layers"] = args.layers or geometry["num_hidden_layers"]
    small = {"device": "cpu", "chunk": 64} if args.tiny else {}
    how = _how(args, cache.place, geometry=geometry)
    return cache.run(tasks, geometry, arms=arms, limit_s=args.limit, **small, **how)


def _how(args: argparse.Namespace, place: Callable[[Result], Any] | None = None, **facts: Any) -> dict[str, Any]:
    """What every benchmark is told: the commit to record, how to say a line, and where to keep its rows.

    Args:
        place: a row's place in the file.
        facts: what rows in one file must share beside the machine and the packages.
    """
    from ..bench.environment import environment
    from ..bench.record import Record

    args.record = Record(args.out, place, getattr(args, "append", False), {**environment(args.commit), **facts})
    return {"commit": args.commit, "say": partial(print, flush=True), "keep": args.record.keep}


def _cases(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench.attention_cases import cases

    known = cases()
    return {name: known[name] for name in chosen("--patterns", _words(args.patterns or ",".join(known)), known)}


def _shape(args: argparse.Namespace) -> Any:
    from ..bench.attention_cases import Shape

    return Shape(getattr(args, "batch", 1), args.heads, args.kv_heads, args.head_dim)


def _tasks(text: str, task: Callable[[str], Any]) -> tuple[Any, ...]:
    tasks = [task(word) for word in _words(text)]
    if twice := [word for word, found in zip(_words(text), tasks, strict=True) if tasks.count(found) > 1]:
        raise ValueError(f"--tasks: {twice[0]!r} is there twice")
    return tuple(tasks)


def _words(text: str, between: str = ",") -> list[str]:
    return [word.strip() for word in text.split(between)]
