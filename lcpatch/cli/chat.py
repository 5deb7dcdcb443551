"""`lcpatch chat MODEL`: talk to a model through a cache; after each answer, what the cache kept and what it holds.

Ctrl-C ends an answer, or the conversation where it is yours to speak.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ._load import load_model

HINT = "Options of METHOD and CACHE follow as `--name value`: `lcpatch chat demo --cache h2o --budget 512`."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk to a model through a cache", description=__doc__, epilog=HINT)
    parser.add_argument("model", metavar="MODEL", help="a folder, an id on the Hub, or `demo`")
    parser.add_argument("--method", metavar="METHOD", help="patch the model with this method")
    parser.add_argument("--cache", metavar="CACHE", help="keep its past in this cache (default: all of it)")
    parser.add_argument("--chunk", type=int, metavar="N", help="with a cache, read what is said N tokens at a time")
    parser.add_argument("--system", metavar="TEXT", help="said before the first turn")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="at most, an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the model was saved")
    parser.set_defaults(run=run, takes_options=True)


def run(args: argparse.Namespace) -> None:
    """Answer every line of the standard input, typed or piped."""
    for name in ("new_tokens", "chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.chunk and args.cache is None:
        raise ValueError(f"--chunk {args.chunk} is for a cache of lcpatch's: add --cache CACHE, or leave it out")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature} must be at least 0")
    from transformers import TextStreamer

    from ..eval.arms import Arm, no_option, sort_options
    from ._conversation import Conversation

    of_method, of_cache, rest = sort_options(args.options, args.method, args.cache)
    if rest:
        raise ValueError(no_option(next(iter(rest)), args.method, args.cache))
    arm = Arm(args.method, of_method, args.cache, of_cache)
    model, tokenizer = load_model(args.model, args.dtype)
    sampled = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    with arm.on(model) as make:
        make = make or _whole(model)
        talk = Conversation(model, tokenizer, make, args.system, args.chunk, max_new_tokens=args.new_tokens, **sampled)
        for line in _lines():
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            turn = talk.say(line, streamer)
            speed = f", then {(turn.tokens - 1) / turn.rest_s:.1f} tokens/s" if turn.tokens > 1 else ""
            print(f"[{_held(talk.cache)}; first token after {turn.first_s:.2f} s{speed}]", flush=True)


def _lines() -> Iterator[str]:
    """What is said: typed at a prompt until Ctrl-D, or the lines of a pipe, echoed."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if typed else "").strip()
            line = line.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are no UTF-8
        except EOFError:
            return
        if line:
            if not typed:
                print(f"> {line}", flush=True)
            yield line


def _whole(model: Any) -> Any:
    from transformers import DynamicCache

    from ..hf.models import unwrap

    return lambda: DynamicCache(config=unwrap(model).config)


def _held(cache: Any) -> str:
    """What a cache has seen, keeps and holds, in words."""
    from ..caches.held import bytes_held

    seen = cache.get_seq_length()
    kept = cache.stats()["kept"] if hasattr(cache, "stats") else seen
    tiers = bytes_held(cache.layers)
    places = [f"{size / 2**20:.1f} MiB" + ("" if tier == "device" else f" on {tier}") for tier, size in tiers.items()]
    return f"{seen} tokens seen, {kept} kept a head, {', '.join(places)}"
