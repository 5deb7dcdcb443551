"""Slots go to pages by when they were used, pages come from the host decoded; kernels match the reference."""

import pytest
import torch
from resident_cases import SIZES, brought, check_slots, tables

from lcpatch_kernels import RecordLayout, bring_pages, take_slots
from lcpatch_kernels.block_sparse import has_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", *(["triton"] if has_triton() else [])]


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize(("slots", "asked", "pages"), SIZES)
def test_the_kernel_gives_the_slots_of_the_reference(slots, asked, pages):
    check_slots(slots, asked, pages, DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_was_used_longest_ago_leaves(impl):
    page_in, used, slot_of, clock, counts = tables(1, 4, 20, DEVICE)
    used[:, -1] = 0
    ask = lambda *pages: take_slots(  # noqa: E731
        torch.tensor([[pages]], device=DEVICE), torch.full((1, 1, 1), 9, device=DEVICE),
        page_in, used, slot_of, clock, counts, impl=impl,
    )  # fmt: skip
    slots, fresh = ask(3, 1, -1, 9)
    assert slots.flatten().tolist() == [0, 1, -1, 4], "the newest page lies behind the slots"
    assert fresh.flatten().tolist() == [3, 1, -1, -1]
    assert ask(1, 5, 6)[0].flatten().tolist() == [1, 2, 3]
    slots, fresh = ask(7, 5, 6)
    assert slots.flatten().tolist() == [0, 2, 3], "3 was used before 1"
    assert fresh.flatten().tolist() == [7, -1, -1]
    assert ask(3, 2)[0].flatten().tolist() == [0, 1], "1, then the first of those used together: 7"
    assert slot_of[0, 1:].tolist() == [-1, -1, 1, 0, -1, 2, 3, *[-1] * 13]
    assert counts.tolist() == [10, 7]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codec", [None, "int8", "int4", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page", "head_dim"), [(4, 8), (32, 64), (16, 96), (1, 8)])
def test_pages_come_as_the_codec_decodes_them(impl, codec, dtype, page, head_dim):
    if impl == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16 and codec in ("int8", "int4", "fp8"):
        pytest.skip("the interpreter cuts fp32 to bf16, a GPU rounds")
    assert torch.equal(*brought(impl, codec, dtype, page, head_dim, DEVICE))


def test_what_does_not_fit_is_said():
    page_in, used, slot_of, clock, counts = tables(6, 4, 20, DEVICE)
    pages = torch.zeros(2, 3, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"clock must be \[6\] in torch.int64"):
        take_slots(pages, None, page_in, used, slot_of, clock[:5], counts)
    data = torch.zeros(2, 3, 2, 8, 8, device=DEVICE)
    given = (pages, pages.int(), pages)
    with pytest.raises(ValueError, match="kind='int3' is not one of"):
        bring_pages(*given, data, 4, RecordLayout("int3", 8))
    with pytest.raises(ValueError, match="of whole pages of 3 tokens"):
        bring_pages(*given, data, 3, RecordLayout("fp32", 8))
    with pytest.raises(ValueError, match="records of 12 bytes"):
        bring_pages(*given, data, 4, RecordLayout("fp32", 12))
    with pytest.raises(ValueError, match="cannot run records of fp64"):
        bring_pages(*given, data.double(), 4, RecordLayout("fp64", 1024), impl="triton")
