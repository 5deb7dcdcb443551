"""`take_slots` and `bring_pages`: a fast tier of pages whose home is host memory, kept by the GPU alone.

The first says which slots pages have, and gives slots to those without; the second reads what came in from the host.
Nothing is read back: shapes follow from how many pages are asked for, so both stand in a CUDA graph.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._check import check_tensor
from .._impl import Impl, choose
from .._ops import add_op_namespace_prefix
from .layout import KINDS, RecordLayout

__all__ = ["KINDS", "RecordLayout", "bring_pages", "take_slots"]


def take_slots(
    pages: Tensor,
    newest: Tensor | None,
    page_in: Tensor,
    used: Tensor,
    slot_of: Tensor,
    clock: Tensor,
    counts: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The slots of pages, of which those that have none get the ones used longest ago. Inference only.

    Every group (a row's KV head) has slots 0, 1, … S - 1 and, behind them, slot S for the newest page. Slots that are
    asked for count as used now. Of `n` pages without one, the first takes the first of the `n` slots used longest ago,
    in the order of the slots, and so on; of slots used at the same time, the first was used longest ago.

    Args:
        pages: int64 [B, K, M], each once in its group, no more than the group has slots; -1: none.
        newest: int64 [B, 1, 1], each row's newest page, which has its place and is not looked for; None: none is.
        page_in, used: int64 [G, 1 + S], group b K + k: each slot's page (-1: none), and when it was used. The first
            column means nothing.
        slot_of: int64 [G, 1 + P], behind such a column: each page's slot, -1 for none.
        clock: int64 [G], one more with every call.
        counts: int64 [2]: pages that were asked for, and those of them that had no slot, are added to it.
        impl: "triton" (a CUDA device, or TRITON_INTERPRET=1), "reference", or "auto".

    Returns:
        `(slots, fresh)`: int32 and int64 [B, K, M]: where each page is (-1: none was asked for), and the pages that
        have a slot only now, the others -1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    groups, device = pages.shape[0] * pages.shape[1], pages.device
    check_tensor("pages", pages, (None, None, None), torch.int64, device)
    for name, x in (("page_in", page_in), ("used", used)):
        check_tensor(name, x, (groups, page_in.shape[-1]), torch.int64, device)
    check_tensor("slot_of", slot_of, (groups, None), torch.int64, device)
    check_tensor("clock", clock, (groups,), torch.int64, device)
    if newest is not None:
        check_tensor("newest", newest, (pages.shape[0], 1, 1), torch.int64, device)
    if counts is not None:
        check_tensor("counts", counts, (2,), torch.int64, device)
    how = choose(impl, page_in.new_empty(0, dtype=torch.float32))
    return _take(pages, newest, page_in, used, slot_of, clock, counts, how)


def bring_pages(
    fresh: Tensor,
    slots: Tensor,
    address: Tensor,
    data: Tensor,
    page_size: int,
    layout: RecordLayout,
    *,
    impl: Impl = "auto",
) -> None:
    """Read pages from the host, decode them, and write them to their slots. Inference only; writes `data`.

    Page-locked memory has an address that a GPU reads by itself, over the bus, at nearly the speed of a copy. It must
    live until its stream is there.

    Args:
        fresh, slots: of `take_slots`: the pages to read, -1 for none, and where they go.
        address: int64 [B, K, P]: where in memory the record of each page lies, at whole words of 8 bytes.
        data: [B, K, 2, T, D], contiguous, keys and values; slot s holds the tokens [s page_size, (s + 1) page_size).
        page_size: tokens a page.
        layout: of a record.
        impl: as in `take_slots`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot run this.
        ImportError: impl="triton" without triton.
    """
    device = data.device
    check_tensor("data", data, (*fresh.shape[:2], 2, None, None), None, device)
    check_tensor("fresh", fresh, (None, None, None), torch.int64, device)
    check_tensor("slots", slots, fresh.shape, torch.int32, device)
    check_tensor("address", address, (*fresh.shape[:2], None), torch.int64, device)
    if layout.kind not in KINDS:
        raise ValueError(f"kind={layout.kind!r} is not one of {', '.join(map(repr, KINDS))}")
    if not data.is_contiguous() or data.shape[3] % page_size or layout.nbytes % 8:
        raise ValueError(
            f"data must be contiguous, of whole pages of {page_size} tokens, and a record of whole words of 8 bytes; "
            f"got {data.shape[3]} tokens with strides {data.stride()} and records of {layout.nbytes} bytes"
        )
    problem = "records of fp64" if layout.kind == "fp64" else None
    _bring(fresh, slots, address, data, page_size, *layout, choose(impl, data, problem))


@torch.library.custom_op(
    add_op_namespace_prefix("take_slots"), mutates_args=("page_in", "used", "slot_of", "clock", "counts")
)
def _take(
    pages: Tensor,
    newest: Tensor | None,
    page_in: Tensor,
    used: Tensor,
    slot_of: Tensor,
    clock: Tensor,
    counts: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _module(impl).take(pages, newest, page_in, used, slot_of, clock, counts)


@_take.register_fake
def _(pages, newest, page_in, used, slot_of, clock, counts, impl):
    return pages.new_empty(pages.shape, dtype=torch.int32), pages.new_empty(pages.shape)


@torch.library.custom_op(add_op_namespace_prefix("bring_pages"), mutates_args=("data",))
def _bring(
    fresh: Tensor,
    slots: Tensor,
    address: Tensor,
    data: Tensor,
    page_size: int,
    kind: str,
    nbytes: int,
    scales: int,
    lows: int,
    group: int,
    impl: str,
) -> None:
    _module(impl).bring(fresh, slots, address, data, page_size, RecordLayout(kind, nbytes, scales, lows, group))


@_bring.register_fake
def _(fresh, slots, address, data, page_size, kind, nbytes, scales, lows, group, impl):
    return None


def _module(impl: str) -> ModuleType:
    if impl == "reference":
        from . import reference

        return reference
    from . import triton  # imported on first use: the package must import without triton

    return triton
