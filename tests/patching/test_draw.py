"""The pictures of masks: cell by cell what the dense oracle says."""

import models
import pytest
import torch

import lcpatch
from lcpatch.patching.draw import coverage, num_kept, shares, tokens
from lcpatch.patterns import LayerShape
from lcpatch_kernels import DENSE, BlockSparseSpec
from lcpatch_kernels.block_sparse.dense import mask_mod

SHAPE = LayerShape(4, 2, rank=1, num_sparse=3)
PATTERNS = {name: cls.from_options(models.SHORT.get(name, {})) for name, cls in lcpatch.methods().items()}
PATTERNS |= {
    "rolled": lcpatch.Shift(wrap=True),
    "ratio": lcpatch.SF(group_ratio=0.3),
    "dense heads": lcpatch.S2(16, local_blocks=2, stride=5, num_dense_heads=1),
}


def oracle(spec: BlockSparseSpec, length: int) -> torch.Tensor:
    """The mask of every head, [H, length, length]."""
    keep = mask_mod(spec, None, length, length, torch.device("cpu"))
    head, i, j = torch.meshgrid(torch.arange(spec.num_heads), torch.arange(length), torch.arange(length), indexing="ij")
    return keep(torch.zeros_like(head), head, i, j)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [1, 63, 111])
def test_every_pair(name, length):
    spec = PATTERNS[name].spec(SHAPE)
    rows, edges = torch.arange(length), torch.arange(length + 1)
    for head, mask in enumerate(oracle(spec, length)):
        kept = num_kept(spec.rules[spec.head_rules[head]], spec.block_size, rows, edges, length)
        assert (kept.diff(dim=1) == mask).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_cells_are_shares_of_causal_pairs(name):
    length, size = 112, 16  # 7 x 7 pairs a cell
    spec = PATTERNS[name].spec(SHAPE)
    causal = torch.ones(length, length).tril().unfold(0, 7, 7).unfold(1, 7, 7).sum((-1, -2))
    for head, mask in enumerate(oracle(spec, length)):
        image = shares(spec.rules[spec.head_rules[head]], spec.block_size, length, size)
        kept = mask.float().unfold(0, 7, 7).unfold(1, 7, 7).sum((-1, -2))
        below = causal > 0
        assert image[below].equal((kept[below] / causal[below]).clamp(max=1))
        above = kept[~below] / 49
        assert image[~below].nan_to_num(0).equal(above)
        assert (image[~below].isnan() == (above == 0)).all()


def test_a_million_tokens_cost_a_picture():
    rule = lcpatch.S2().rules(SHAPE)[0]
    image = shares(rule, 64, 1 << 20, size=64)
    assert image.shape == (64, 64)
    stripe = image[40:, 1:20]  # far from the window and the sinks: one block in sixteen
    assert stripe.equal(torch.full_like(stripe, 1 / 16))


def test_coverage():
    assert coverage([BlockSparseSpec.of([DENSE])], 100) == 1
    window = lcpatch.Sink(num_sinks=4, window=16).spec(SHAPE)
    assert coverage([window], 100) == pytest.approx(0.2)
    s2 = lcpatch.S2(16, local_blocks=1, stride=4, sink_blocks=0)
    layers = [s2.spec(LayerShape(4, 2, rank, 2)) for rank in range(2)]
    assert coverage(layers[:1], 16 * 64) < 0.6
    assert coverage(layers, 16 * 64) == 1


def test_numbers_of_tokens():
    assert [tokens(n) for n in (7, 1000, 4096, 1536, 1 << 20)] == ["7", "1000", "4K", "1.5K", "1M"]
