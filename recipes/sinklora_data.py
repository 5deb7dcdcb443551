"""SinkLoRA's supervised fine-tuning data by its published proportions, from data sets of your own. arXiv 2406.05678.

    python recipes/sinklora_data.py --natural-questions nq.jsonl --redpajama pile/ --book-summaries books.parquet \\
        --longqa longalpaca.jsonl --out sinklora.jsonl
    accelerate launch recipes/sinklora.py --config recipes/configs/sinklora_sft.yaml --data sinklora.jsonl --model MODEL

The paper's 28,000 conversations were not released; of them 44 % are Natural Questions, 27 % RedPajama, 18 % book
summaries and 11 % LongQA. `lcpatch/training/mixture.py` says how a record of each becomes a conversation.
"""

import argparse
from pathlib import Path

from lcpatch.training import recipe
from lcpatch.training.mixture import SINKLORA, SINKLORA_ROWS, mix


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, component in SINKLORA.items():
        says = f"files, folders or hub:NAME@SPLIT; records with {component.fields}"
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", required=True, metavar="DATA", help=says)
    parser.add_argument("--rows", type=int, default=SINKLORA_ROWS, help=f"conversations (default {SINKLORA_ROWS})")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the order (default 0)")
    parser.add_argument("--out", type=Path, default=Path("sinklora.jsonl"), help="default sinklora.jsonl")
    args = parser.parse_args(argv)
    found = mix({name: getattr(args, name) for name in SINKLORA}, args.out, rows=args.rows, seed=args.seed)
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in found.items()))
    return 0


if __name__ == "__main__":
    recipe.script(main)
