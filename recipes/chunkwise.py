"""SeCO and SpaCO: texts too long for one backward pass, a chunk's activations at a time. arXiv 2505.16710.

    accelerate launch recipes/chunkwise.py
    accelerate launch recipes/chunkwise.py --config recipes/configs/chunkwise.yaml --model MODEL --data FILES

SeCO gives the gradients of the whole row, exactly, for the memory of one chunk and the row's keys and values, or with
`--offload` of a chunk alone. `--keep-chunks 0.25` is SpaCO: it computes the gradient of a random quarter of the chunks,
and is right on average. Any arm of `--attention full|s2` whose pattern does not follow the length can be trained so.
"""

import lcpatch
from lcpatch.training import recipe

DEFAULTS = {"attention": "full", "chunk_size": 256, "output": "chunkwise-run"}


def main(argv=None) -> int:
    return recipe.main(argv, DEFAULTS, lcpatch.save_pretrained, __doc__)


if __name__ == "__main__":
    recipe.script(main)
