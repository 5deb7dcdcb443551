"""A fast tier of pages in plain torch. The definition for the kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .layout import RecordLayout


def take(
    pages: Tensor,
    newest: Tensor | None,
    page_in: Tensor,
    used: Tensor,
    slot_of: Tensor,
    clock: Tensor,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(slots, fresh)`. What is read or written for no page and no slot goes to the tables' first column."""
    num_slots = page_in.shape[1] - 1
    is_open = torch.zeros_like(pages, dtype=torch.bool) if newest is None else (pages == newest) & (pages >= 0)
    page = pages.masked_fill(is_open, -1).flatten(0, 1)
    clock += 1
    slot = slot_of.gather(1, page + 1)
    used.scatter_(1, slot + 1, clock[:, None].expand_as(slot))
    missing = (page >= 0) & (slot < 0)
    if counts is not None:
        counts += torch.stack([(page >= 0).sum(), missing.sum()])
    if num_slots:
        age = used[:, 1:].argsort(dim=1, stable=True)
        leaves = torch.zeros_like(age, dtype=torch.bool)
        leaves.scatter_(1, age, torch.arange(num_slots, device=age.device) < missing.sum(1, keepdim=True))
        first = (~leaves).to(torch.int8).argsort(dim=1, stable=True)
        new = first.gather(1, (missing.cumsum(1) - 1).clamp(0, num_slots - 1)).masked_fill(~missing, -1)
        slot_of.scatter_(1, page_in.gather(1, new + 1) + 1, -1)
        page_in.scatter_(1, new + 1, page.masked_fill(~missing, -1))
        used.scatter_(1, new + 1, clock[:, None].expand_as(new))
        slot_of.scatter_(1, page.masked_fill(~missing, -1) + 1, new)
        slot = torch.maximum(slot, new)
    slots = slot.view(pages.shape).masked_fill(is_open, num_slots).int()
    return slots, page.masked_fill(~missing, -1).view(pages.shape)


def bring(fresh: Tensor, slots: Tensor, address: Tensor, data: Tensor, page_size: int, layout: RecordLayout) -> None:
    """Reads the host's memory at the addresses, one record after another."""
    where = (fresh >= 0).nonzero().unbind(1)
    if not len(where[0]):
        return
    row, head, _ = where
    places = address[row, head, fresh[where]].tolist()
    records = torch.stack([_memory(place, layout.nbytes) for place in places]).to(data.device)
    pages = decode(records, (2, page_size, data.shape[4]), layout).to(data.dtype)
    data.unflatten(3, (-1, page_size))[row, head, :, slots[where].long()] = pages


def decode(records: Tensor, shape: tuple[int, int, int], layout: RecordLayout) -> Tensor:
    """Records uint8 [n, bytes] -> [n, *shape], as they are stored or, with scales, in fp32."""
    num = shape[0] * shape[1] * shape[2]

    def part(start: int, count: int, dtype: torch.dtype) -> Tensor:
        return records[:, start : start + count * dtype.itemsize].contiguous().view(dtype)

    if layout.kind == "int4":
        packed = part(0, num // 2, torch.uint8)
        x = torch.stack([packed & 15, packed >> 4], -1).flatten(1).float()
    else:
        x = part(0, num, layout.dtype)
    if layout.group:
        groups = x.float().unflatten(1, (-1, layout.group))
        x = groups * part(layout.scales, groups.shape[1], torch.float32)[..., None]
        if layout.kind == "int4":
            x = x + part(layout.lows, groups.shape[1], torch.float32)[..., None]
    return x.reshape(-1, *shape)


def _memory(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
