"""S2: a model that attends sparsely in training and in inference, so that its cache can forget. arXiv 2407.17678.

    accelerate launch recipes/s2.py
    accelerate launch recipes/s2.py --config recipes/configs/s2.yaml --model MODEL --data FILES

Local blocks and a stripe of far blocks for every KV head, in every second layer: a dense checkpoint loses quality under
it, and a little training brings it back. `--layers` says which layers are sparse. `--attention
full|short|shift|sf|s2` trains another arm, everything else equal.
"""

import lcpatch
from lcpatch.training import recipe

DEFAULTS = {
    "attention": "s2",
    "layers": "every_2",
    "options": {"local_blocks": 4, "stride": 8},  # 256 of 1,024 tokens nearby; configs/s2.yaml has the paper's sizes
    "output": "s2-run",
}


def main(argv=None) -> int:
    return recipe.main(argv, DEFAULTS, lcpatch.save_pretrained, __doc__)


if __name__ == "__main__":
    recipe.script(main)
