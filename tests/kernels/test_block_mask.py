"""The tables that FlexAttention is given, against the ones it would make itself."""

import pytest
import torch
from block_sparse_cases import KINDS, make_spec
from torch.nn.attention.flex_attention import create_block_mask

from lcpatch_kernels.block_sparse import BlockSparseSpec, Rule, dense

ROLLED = BlockSparseSpec.of([Rule(group=96, back=0, cyclic=True, shifted=h % 2 == 1) for h in range(4)])
PACKED = [[[0, 130, 0, 130], [130, 300, 130, 300]], [[0, 0, 0, 0], [9, 300, 9, 300]]]


def tables(mask, *, full: bool) -> torch.Tensor:
    """[B, H, T / 128, S / 128]: the tiles that are listed as whole, or as masked in part."""
    count, index = (mask.full_kv_num_blocks, mask.full_kv_indices) if full else (mask.kv_num_blocks, mask.kv_indices)
    listed = torch.zeros(index.shape, dtype=torch.bool)
    used = torch.arange(index.shape[3]) < count[..., None]
    return listed.scatter(3, index.long(), used)


@pytest.mark.parametrize("sizes", [(300, 300), (256, 256), (70, 300)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["rolled", *KINDS])
def test_the_tables_are_flex_attentions_own(kind, packed, sizes):
    if packed and sizes != (300, 300):
        pytest.skip("the packed bounds are of 300 tokens")
    spec = ROLLED if kind == "rolled" else make_spec(kind, 4, 2, 32)
    bounds = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    device = torch.device("cpu")
    ours = dense.block_mask(spec, bounds, *sizes, device)
    keep = dense.mask_mod(spec, bounds, *sizes, device)
    theirs = create_block_mask(keep, 2 if packed else 1, 4, *sizes, device="cpu")
    for full in (False, True):
        assert torch.equal(tables(ours, full=full), tables(theirs, full=full)), full
    assert ours.seq_lengths == sizes
    assert tables(ours, full=False).any()


def test_layers_and_steps_share_one():
    again = BlockSparseSpec.of([Rule(group=96, back=0, cyclic=True, shifted=h % 2 == 1) for h in range(4)])
    device = torch.device("cpu")
    first = dense._whole_block_mask(ROLLED, 300, 300, device)
    assert dense._whole_block_mask(again, 300, 300, device) is first
    assert dense._whole_block_mask(again, 301, 301, device) is not first
