"""Slots go to pages by when they were used, pages come from the host decoded; kernels match the reference."""

import pytest
import torch

from lcpatch.caches.codec import codec_named
from lcpatch.caches.records import Record
from lcpatch_kernels import RecordLayout, bring_pages, take_slots
from lcpatch_kernels.block_sparse import has_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", *(["triton"] if has_triton() else [])]
NEVER = 1 << 62


def tables(groups, slots, pages):
    """Empty ones; the last group may not have its last slot."""
    page_in, slot_of = torch.full((groups, 1 + slots), -1), torch.full((groups, 1 + pages), -1)
    used = torch.zeros(groups, 1 + slots, dtype=torch.int64)
    used[-1, -1] = NEVER
    counts, clock = torch.zeros(2, dtype=torch.int64), torch.zeros(groups, dtype=torch.int64)
    return [x.to(DEVICE) for x in (page_in, used, slot_of, clock, counts)]


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize(("slots", "asked", "pages"), [(5, 4, 9), (16, 7, 64), (37, 33, 41)])
def test_the_kernel_gives_the_slots_of_the_reference(impl, slots, asked, pages):
    rng, both = torch.Generator().manual_seed(slots), [tables(6, slots, pages) for _ in range(2)]
    for n in range(25):
        wanted = torch.stack([torch.randperm(pages, generator=rng)[:asked] for _ in range(6)])
        wanted[torch.rand(6, asked, generator=rng) < 0.3] = -1
        newest = wanted.view(2, 3, asked)[:, :1, -1:].clone().to(DEVICE) if n % 3 else None
        wanted = wanted.view(2, 3, asked).to(DEVICE)
        got = [
            take_slots(wanted, newest, *(x for x in state), impl=how)
            for how, state in zip(("reference", impl), both, strict=True)
        ]
        for one, other in zip(*got, strict=True):
            assert torch.equal(one, other)
        for name, one, other in zip(("page_in", "used", "slot_of"), *both, strict=False):
            assert torch.equal(one[:, 1:], other[:, 1:]), name
        for one, other in zip(both[0][3:], both[1][3:], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_was_used_longest_ago_leaves(impl):
    page_in, used, slot_of, clock, counts = tables(1, 4, 20)
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
    batch, heads, num, slots = 2, 3, 5, 4
    rng = torch.Generator().manual_seed(page)
    pages = (torch.randn(batch * heads * num, 2, page, head_dim, generator=rng) * 3).to(dtype)
    record = Record(codec_named(codec), page, torch.empty(1, heads, 0, head_dim, dtype=dtype))
    stored = record.pack(pages)
    want = record.unpack(stored)
    stored = stored.pin_memory() if DEVICE == "cuda" else stored
    places = stored.data_ptr() + torch.arange(len(pages)) * record.nbytes
    data = torch.randn(batch, heads, 2, (slots + 1) * page, head_dim, generator=rng).to(dtype)
    expected = data.clone().unflatten(3, (-1, page))
    fresh = torch.tensor([[[4, -1, 0], [-1, -1, -1], [2, 1, -1]], [[-1, -1, 3], [0, 1, 2], [1, -1, -1]]])
    where = torch.tensor([[[1, 2, 0], [0, 1, 2], [2, 3, -1]], [[0, 1, 2], [3, 0, 1], [0, 4, 1]]])
    for b, k, m in (fresh >= 0).nonzero().tolist():
        expected[b, k, :, where[b, k, m]] = want[(b * heads + k) * num + fresh[b, k, m]]
    given = (x.to(DEVICE) for x in (fresh, where.int(), places.view(batch, heads, num)))
    data = data.to(DEVICE)
    bring_pages(*given, data, page, record.layout, impl=impl)
    assert torch.equal(data.cpu(), expected.flatten(3, 4))


def test_what_does_not_fit_is_said():
    page_in, used, slot_of, clock, counts = tables(6, 4, 20)
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
