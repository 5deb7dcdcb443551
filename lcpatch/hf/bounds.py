"""Where each row's real tokens lie, in a form that passes through a model as its attention mask.

A `compact` mask is int32 [B, 1, 1 + N, 4]. Row 0 is (q_offset, 0, 0, 0): how many keys precede the first query. The
other rows are the segments (q0, q1, k0, k1) that `lcpatch_kernels.block_sparse` takes as `bounds`. It has four
dimensions so that transformers passes it on untouched, also when `generate` makes it ahead of the forward.

No size depends on data but N, the most documents in a row of a packed batch; where that would have to be read back from
the device under tracing, packing must be said by `cu_seq_lens`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

# position_ids -> (version, mask, batch, bounds): the layers of a forward, and their recomputation, look once.
_documents: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_compact(mask: object) -> bool:
    """Whether `mask` is a compact mask of ours."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 4


def compact(bounds: Tensor, q_offset: int | Tensor) -> Tensor:
    """The compact mask of `bounds` [B, N, 4]."""
    header = torch.zeros_like(bounds[:, :1])
    header[..., 0] = q_offset
    return torch.cat([header, bounds], 1)[:, None]


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(bounds [B, N, 4], q_offset [])` of a compact mask."""
    return mask[:, 0, 1:], mask[0, 0, 0, 0]


def from_padding(real: Tensor | None, batch: int, num_queries: int, seen: int | Tensor, device: torch.device) -> Tensor:
    """Bounds of rows whose real tokens are one run.

    Args:
        real: bool [B, S], which of the keys are tokens and not pads; None: all that were seen.
        batch: number of rows, B.
        num_queries: number of queries; the last of them is key `seen` - 1.
        seen: keys seen so far, the queries among them. S may be larger (a static cache).

    Raises:
        ValueError: pads between real tokens (not checked under tracing).
    """
    seen = torch.as_tensor(seen, device=device)
    if real is None:
        k0, k1 = torch.zeros(batch, dtype=torch.int64, device=device), seen.long().expand(batch)
    else:
        real = real & (torch.arange(real.shape[1], device=device) < seen)
        count = real.sum(-1)
        k0 = real.int().argmax(-1)
        k1 = torch.where(count > 0, real.shape[1] - real.flip(-1).int().argmax(-1), k0)
        if not torch.compiler.is_compiling() and bool((count != k1 - k0).any()):
            row = int((count != k1 - k0).nonzero()[0])
            raise ValueError(
                f"row {row} of attention_mask has padding between real tokens; lcpatch counts blocks and sinks along "
                "one run of tokens: pad on the left (tokenizer.padding_side = 'left') or the right, not in the middle"
            )
    first = seen - num_queries  # key of the first query
    q0 = (k0 - first).clamp(0, num_queries)
    q1 = torch.maximum((k1 - first).clamp(0, num_queries), q0)
    return torch.stack([q0, q1, k0, k1], -1)[:, None].int()


def from_starts(starts: Tensor, within: Tensor | None = None) -> Tensor:
    """Bounds of packed rows: every query is its own key, and a document begins wherever `starts` is true.

    Args:
        starts: bool [B, T]; reads its maximal number of documents per row from the device.
        within: bounds [B, 1, 4] of the rows' real tokens; None: all.
    """
    num_rows, num_tokens = starts.shape
    token = torch.arange(num_tokens, device=starts.device)
    starts = starts.clone()
    first, last = (0, num_tokens) if within is None else within[..., 0:2].unbind(-1)
    if within is None:
        starts[:, 0] = True
        end = torch.full((num_rows, 1), num_tokens, device=starts.device)
    else:
        inside = (token >= first) & (token < last)
        starts = (starts | (token == first)) & inside
        end = last.long()
    document = starts.cumsum(-1)
    most = max(int(document[:, -1].max()), 1)
    begin = end.expand(-1, most + 1).clone()  # missing documents are empty, at the row's end
    index = torch.where(starts, document - 1, most)  # tokens that start nothing write to a slot that is cut off
    begin = begin.scatter(1, index, torch.where(starts, token.expand_as(index), end))[:, : most + 1]
    begin = torch.cat([begin[:, :most], end], 1)
    q0, q1 = begin[:, :-1], begin[:, 1:]
    return torch.stack([q0, q1, q0, q1], -1).int()


def from_cu_seq_lens(cu_seq_lens: Tensor) -> Tensor:
    """Bounds [1, N, 4] of one flattened row, from the offsets [N + 1] that flash attention takes."""
    begin, end = cu_seq_lens[:-1], cu_seq_lens[1:]
    return torch.stack([begin, end, begin, end], -1)[None].int()


def from_positions(position_ids: Tensor, mask: Tensor | None, batch: int) -> Tensor | None:
    """Bounds of packed rows whose documents show as restarting positions; None where no row is packed.

    Reads one flag from the device, once per forward. Under tracing, where nothing can be read, it asserts on the device
    that no position restarts.

    Args:
        position_ids: [1 or B, T].
        mask: the compact mask of the rows' padding, or None.
        batch: number of rows, B.
    """
    positions = position_ids.expand(batch, -1)
    within = None if mask is None else split(mask)[0]
    if torch.compiler.is_compiling():
        torch._assert_async(
            ~_restarts(positions, within).any(), "packed documents under torch.compile need cu_seq_lens"
        )
        return None
    if position_ids.is_inference():  # carries no version, so a change in place could not be noticed
        return _from_restarts(positions, within)
    version, known_mask, known_batch, bounds = _documents.get(position_ids, (None, None, None, None))
    if version != position_ids._version or known_mask is not mask or known_batch != batch:
        bounds = _from_restarts(positions, within)
        _documents[position_ids] = (position_ids._version, mask, batch, bounds)
    return bounds


def _from_restarts(positions: Tensor, within: Tensor | None) -> Tensor | None:
    restarts = _restarts(positions, within)
    return from_starts(restarts, within) if bool(restarts.any()) else None


def _restarts(positions: Tensor, within: Tensor | None) -> Tensor:
    """Where a position does not follow upon the one before: bool [B, T]. Pads count for nothing."""
    restarts = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
    if within is None:
        return restarts
    token = torch.arange(positions.shape[1], device=positions.device)
    return restarts & (token > within[..., 0]) & (token < within[..., 1])
