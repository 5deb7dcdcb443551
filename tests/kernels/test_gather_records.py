"""Records come back by their number, from whichever block they lie in; the interpreted kernel gives the same."""

import pytest
import torch

from lcpatch_kernels import block_table, gather_records
from lcpatch_kernels.block_sparse import has_triton

IMPLS = ["reference"]
if has_triton() and not torch.cuda.is_available():
    IMPLS.append("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(sizes, record):
    blocks = [torch.randint(0, 256, (n, record), dtype=torch.uint8, pin_memory=DEVICE == "cuda") for n in sizes]
    return blocks, block_table(blocks, DEVICE), torch.cat([x.clone() for x in blocks])


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("sizes", [[7], [1, 1, 5], [64, 3, 128]])
@pytest.mark.parametrize("record", [8, 104, 8448])
def test_a_record_is_found_by_its_number(impl, sizes, record):
    blocks, table, everything = make(sizes, record)
    for numbers in (torch.randperm(sum(sizes)), torch.tensor([0, sum(sizes) - 1, 0]), torch.arange(0)):
        got = gather_records(blocks, table, numbers.to(DEVICE), impl=impl)
        assert got.device.type == DEVICE
        assert torch.equal(got.cpu(), everything[numbers])


def test_what_does_not_fit_is_said():
    blocks, table, _ = make([4], 16)
    numbers = torch.tensor([0], device=DEVICE)
    with pytest.raises(ValueError, match="12 bytes, which must be a multiple of 8"):
        gather_records([x[:, :12] for x in blocks], table, numbers)
    with pytest.raises(ValueError, match=r"table must be \[2, 2\]"):
        gather_records(blocks * 2, table, numbers)
    with pytest.raises(ValueError, match="impl='cuda' is not one of"):
        gather_records(blocks, table, numbers, impl="cuda")
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="page-locked memory only"):
            gather_records([x.clone() for x in blocks], table, numbers)
