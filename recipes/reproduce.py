"""What SF-Attn, shifted groups and S2 recover, trained on equal budgets: the answer to SinkLoRA's 39 % and 92 %.

    python recipes/reproduce.py --model FOLDER --data TEXTS --eval-text TEXTS --out results/smollm2
    python recipes/reproduce.py … --minutes 25        # stops in time; the same command goes on
    python recipes/reproduce.py --out results/smollm2 --report            # the tables of what is there
    python recipes/reproduce.py --out results/smollm2 --report --write recipes/RESULTS.md --plot recipes/results.png

SmolLM2-135M's 8K positions are stretched to 32K by position interpolation; every arm then trains LoRA+ on the same
tokens, in the same order, from the same weights. Each is evaluated densely and under its own pattern: perplexity over
windows with bootstrap intervals, pass keys, and R = (P0 - P) / (P0 - Pfull) against two baselines P0: interpolation
without training, and training with plain groups ("short"). SinkLoRA states neither P0 nor Pfull (arXiv 2406.05678).
R is of the seeds that the arm and both ends have: with an interval from three on, of two with each one's own R.
"""

import argparse
import math
from pathlib import Path

from lcpatch.caches import caches
from lcpatch.core.markdown import with_block
from lcpatch.eval.study import UNTUNED, Study, found_in, run
from lcpatch.eval.study_report import picture, summary
from lcpatch.training import recipe
from lcpatch.training.config import TrainConfig


def arms(length: int) -> dict[str, dict]:
    """Groups are a quarter of the trained length, fixed, so that patterns also run while a text still grows."""
    group = {"group_size": length // 4}
    return {
        UNTUNED: {},
        "full": {"attention": "full"},
        "short": {"attention": "short", "options": group},
        "shift": {"attention": "shift", "options": group},
        "shift-rolled": {"attention": "shift", "options": {**group, "wrap": True}},
        "shift+sinks": {"attention": "sf", "options": {**group, "returned_fraction": 0.0}},
        "sf-no-sinks": {"attention": "sf", "options": {**group, "num_sinks": 0}},
        "sf": {"attention": "sf", "options": group},
        "s2-half": {"attention": "s2", "layers": "every_2"},
        "s2": {"attention": "s2"},
        "seco": {"attention": "full", "chunk_size": length // 8},
        "spaco": {"attention": "full", "chunk_size": length // 8, "keep_chunks": 0.25},
    }


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", nargs="+", default=[], help="what to train on (default: Python's manual)")
    parser.add_argument("--eval-text", nargs="+", help="what to evaluate on, not part of --data")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of results.jsonl (default: study)")
    parser.add_argument("--length", type=int, default=32768, help="tokens of a row (default 32768)")
    parser.add_argument("--steps", type=int, default=150, help="rows of training (default 150)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default 2e-4")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm (default 3)")
    parser.add_argument("--windows", type=int, default=16, help="of perplexity at each length (default 16)")
    parser.add_argument("--passkeys", type=int, default=2, help="pass keys a depth; 0: none (default 2)")
    parser.add_argument("--arms", help="comma-separated, out of: " + ", ".join(arms(4)))
    parser.add_argument("--minutes", type=float, default=math.inf, help="do not begin what would not end by then")
    parser.add_argument("--checkpointing", default="full", choices=["full", "selective", "none"], help="default full")
    parser.add_argument("--report", action="store_true", help="run nothing; show what is in --out")
    parser.add_argument("--write", type=Path, help="put the tables between this file's study markers")
    parser.add_argument("--plot", type=Path, help="draw loss curves and perplexities into this file")
    return parser.parse_args(argv)


def study(args: argparse.Namespace) -> Study:
    every = arms(args.length)
    wanted = [name.strip() for name in args.arms.split(",")] if args.arms else list(every)
    if unknown := [name for name in wanted if name not in every]:
        raise ValueError(f"--arms: {unknown[0]!r} is not one of {', '.join(every)}")
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be at least 1")
    config = TrainConfig(
        model=args.model,
        data=tuple(args.data),
        length=args.length,
        documents="joined",
        steps=args.steps,
        learning_rate=args.learning_rate,
        warmup=max(1, args.steps // 10),
        checkpointing=args.checkpointing,
        log_every=10,
    )
    has_h2o = "h2o" in caches.all()
    return Study(
        config,
        {name: every[name] for name in wanted},
        range(args.seeds),
        args.eval_text,
        (args.length // 2, args.length),
        args.windows,
        args.passkeys,
        cache="h2o" if has_h2o else None,  # SinkLoRA's own pairing
        cache_options={"budget": 0.25},
        cache_chunk=max(args.length // 16, 1),
        cached=("sf",),
    )


def main(argv=None) -> int:
    args = parse(argv)
    if args.report:
        store = found_in(args.out)
    else:
        store = run(study(args), args.out, args.minutes, lambda line: print(line, flush=True))
    if not store.rows:
        print(f"nothing was measured yet in {args.out}")
        return 0
    print(f"\n{summary(store)}")
    if args.write:
        args.write.write_text(with_block(args.write, "study", summary(store)), encoding="utf-8")
    if args.plot:
        picture(store).savefig(args.plot, dpi=150)
    return 0


if __name__ == "__main__":
    recipe.script(main)
