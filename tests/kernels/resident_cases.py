"""Cases of `take_slots` and `bring_pages`, for the interpreter and for a GPU."""

import torch

from lcpatch.caches.codec import codec_named
from lcpatch.caches.records import Record
from lcpatch_kernels import bring_pages, take_slots

NEVER = 1 << 62
SIZES = [(5, 4, 9), (16, 7, 64), (37, 33, 41)]
"""Slots, pages asked for at a time, pages."""


def tables(groups, slots, pages, device):
    """Empty ones; the last group may not have its last slot."""
    page_in, slot_of = torch.full((groups, 1 + slots), -1), torch.full((groups, 1 + pages), -1)
    used = torch.zeros(groups, 1 + slots, dtype=torch.int64)
    used[-1, -1] = NEVER
    counts, clock = torch.zeros(2, dtype=torch.int64), torch.zeros(groups, dtype=torch.int64)
    return [x.to(device) for x in (page_in, used, slot_of, clock, counts)]


def check_slots(slots, asked, pages, device):
    """The kernel and the reference, over random requests: the same slots, tables and counts after each."""
    rng, both = torch.Generator().manual_seed(slots), [tables(6, slots, pages, device) for _ in range(2)]
    for n in range(25):
        wanted = torch.stack([torch.randperm(pages, generator=rng)[:asked] for _ in range(6)])
        wanted[torch.rand(6, asked, generator=rng) < 0.3] = -1
        wanted = wanted.view(2, 3, asked).to(device)
        newest = wanted[:, :1, -1:].clone() if n % 3 else None
        got = [
            take_slots(wanted, newest, *state, impl=how)
            for how, state in zip(("reference", "triton"), both, strict=True)
        ]
        for one, other in zip(*got, strict=True):
            assert torch.equal(one, other)
        for name, one, other in zip(("page_in", "used", "slot_of"), *both, strict=False):
            assert torch.equal(one[:, 1:], other[:, 1:]), name
        for one, other in zip(both[0][3:], both[1][3:], strict=True):
            assert torch.equal(one, other)


def brought(impl, codec, dtype, page, head_dim, device):
    """Data with pages brought into it, and what it should be; on the host."""
    batch, heads, num, slots = 2, 3, 5, 4
    rng = torch.Generator().manual_seed(page)
    pages = (torch.randn(batch * heads * num, 2, page, head_dim, generator=rng) * 3).to(dtype)
    record = Record(codec_named(codec), page, torch.empty(1, heads, 0, head_dim, dtype=dtype))
    stored = record.pack(pages)
    want = record.unpack(stored)
    stored = stored.pin_memory() if device == "cuda" else stored
    places = stored.data_ptr() + torch.arange(len(pages)) * record.nbytes
    data = torch.randn(batch, heads, 2, (slots + 1) * page, head_dim, generator=rng).to(dtype)
    expected = data.clone().unflatten(3, (-1, page))
    fresh = torch.tensor([[[4, -1, 0], [-1, -1, -1], [2, 1, -1]], [[-1, -1, 3], [0, 1, 2], [1, -1, -1]]])
    where = torch.tensor([[[1, 2, 0], [0, 1, 2], [2, 3, -1]], [[0, 1, 2], [3, 0, 1], [0, 4, 1]]])
    for b, k, m in (fresh >= 0).nonzero().tolist():
        expected[b, k, :, where[b, k, m]] = want[(b * heads + k) * num + fresh[b, k, m]]
    given = (x.to(device) for x in (fresh, where.int(), places.view(batch, heads, num)))
    data = data.to(device)
    bring_pages(*given, data, page, record.layout, impl=impl)
    return data.cpu(), expected.flatten(3, 4)
