"""Bookmarks for a retrieval cache, learnt from any text. arXiv 2502.11444.

    python recipes/retrieval.py --model MODEL --data TEXTS --out bookmarks.safetensors

Then `RetrievalCache(model, scorer=Bookmarks.load("bookmarks.safetensors"))`, `Bookmarks` of `lcpatch.caches.scorers`.
The model is frozen; each step reads one row of text and moves two projections a layer. Two stages:

- contrastive (default): from the model's own attention. Recall is the share of the attention on pages that a token may
  choose, which the best quarter of them holds.
- lm, or both in this order: from the loss of a row's last tokens, which read pages within the budget. Its gradient is
  far noisier, so give it many rows, and see by the rows held out whether it helped.

What is learnt is written after each stage; `--bookmarks` goes on from it. Measured on rows held out: means (nothing is
learnt), and what came of each stage.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lcpatch.caches.scorers import Bookmarks
from lcpatch.hf.demo_model import cache_folder
from lcpatch.training import encode, recipe, tokens
from lcpatch.training.bookmarks import measure_bookmarks, train_bookmarks
from lcpatch.training.bookmarks_lm import measure_reading, tune_bookmarks
from lcpatch.training.model import resolve
from lcpatch.training.rows import TextRows
from lcpatch.training.sources import sources


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", nargs="+", default=[], help="files, folders or hub:NAME (default: Python's manual)")
    parser.add_argument("--stage", choices=["contrastive", "lm", "both"], default="contrastive")
    parser.add_argument("--bookmarks", type=Path, help="file to go on from (default: new ones, which score as means)")
    parser.add_argument("--out", type=Path, default=Path("bookmarks.safetensors"), help="default bookmarks.safetensors")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row (default 8192)")
    parser.add_argument("--steps", type=int, default=200, help="rows of a stage, at most what there is (default 200)")
    parser.add_argument("--held-out", type=int, default=4, help="rows to measure on (default 4)")
    parser.add_argument("--page", type=int, default=128, help="tokens a page, as in the cache (default 128)")
    parser.add_argument("--recent", type=int, default=128, help="newest tokens, always read, as there (default 128)")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that stage lm reads, as there (default 2048)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of stage contrastive (default 1e-3)")
    parser.add_argument("--lm-learning-rate", type=float, default=1e-4, help="of stage lm (default 1e-4)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    if args.out.is_dir():
        raise ValueError(
            f"--out {args.out} is a folder; name the file to write, such as {args.out}/bookmarks.safetensors"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)  # better now than after the training
    name = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    store = tokens.build(sources(args.data), encode.texts(tokenizer), cache_folder() / "tokens")
    rows = TextRows(store, args.length, masked=False)
    if args.held_out < 1 or len(rows) <= args.held_out:
        raise ValueError(
            f"--held-out {args.held_out} must be at least 1 and less than the {len(rows)} rows of the data"
        )
    texts = [rows[n]["input_ids"][None] for n in range(min(len(rows), args.steps + args.held_out))]
    held_out, learnt = texts[: args.held_out], texts[args.held_out :]
    begun = None if args.bookmarks is None else Bookmarks.load(args.bookmarks)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
    bookmarks = Bookmarks.of(model) if begun is None else begun

    pages = {"page": args.page, "recent": args.recent}
    reading = {**pages, "budget": args.budget}
    stages = ["contrastive", "lm"] if args.stage == "both" else [args.stage]

    def measure(what: str, bookmarks: Bookmarks) -> None:
        loss, recall = measure_bookmarks(model, held_out, bookmarks, **pages)
        said = f"held out, {what}: contrast {loss:.4f}, recall {recall:.3f}"
        if "lm" in stages:
            said += f", lm loss {measure_reading(model, held_out, bookmarks, **reading):.4f}"
        print(said, flush=True)

    def say(step: int, loss: float, recall: float | None = None) -> None:
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}" + ("" if recall is None else f", recall {recall:.3f}"), flush=True)

    measure("means", Bookmarks.of(model))
    if args.bookmarks is not None:
        measure(str(args.bookmarks), bookmarks)
    for stage in stages:
        if stage == "lm":
            tune_bookmarks(model, learnt, bookmarks, lr=args.lm_learning_rate, say=say, **reading)
        else:
            train_bookmarks(model, learnt, bookmarks=bookmarks, lr=args.learning_rate, say=say, **pages)
        measure(f"after stage {stage}", bookmarks)
        bookmarks.save(args.out)
        print(f"bookmarks: {args.out}")
    return 0


if __name__ == "__main__":
    recipe.script(main)
