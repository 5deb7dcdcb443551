"""SinkLoRA: a longer context by SF-Attn (groups, some heads shifted, sink tokens) and LoRA+. arXiv 2406.05678.

    accelerate launch recipes/sinklora.py
    accelerate launch recipes/sinklora.py --config recipes/configs/sinklora.yaml --model MODEL --data FILES
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/sinklora.py --model MODEL --data FILES …

Without arguments it trains SmolLM2-135M on Python's manual for 20 steps, on whatever machine this is. Sparse in
training and dense afterwards, as in the paper, whose own repository has neither SF-Attn nor sinks:
`lcpatch/patterns/sf.py` says how its text was read. `--attention full|short|shift|sf|s2` trains another arm, everything
else equal.
"""

import lcpatch
from lcpatch.training import recipe

DEFAULTS = {"attention": "sf", "output": "sinklora-run"}


def main(argv=None) -> int:
    return recipe.main(argv, DEFAULTS, lcpatch.save_pretrained, __doc__)


if __name__ == "__main__":
    recipe.script(main)
