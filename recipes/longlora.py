"""LongLoRA: a longer context by shifted groups and LoRA+. arXiv 2309.12307.

    accelerate launch recipes/longlora.py
    accelerate launch recipes/longlora.py --config recipes/configs/longlora.yaml --model MODEL --data FILES

Half of the heads attend within groups of a quarter of the text, the other half within groups shifted by half a group:
sparse in training, dense afterwards. `--wrap` rolls the groups as the paper's pseudo-code does, which shows the first
tokens the last ones: for parity only. `--attention full|short|shift|sf|s2` trains another arm, everything else equal.
"""

import lcpatch
from lcpatch.training import recipe

DEFAULTS = {"attention": "shift", "output": "longlora-run"}


def main(argv=None) -> int:
    return recipe.main(argv, DEFAULTS, lcpatch.save_pretrained, __doc__)


if __name__ == "__main__":
    recipe.script(main)
