"""The evicting cache of Sparsely-Sharded attention: what the pattern will never read again is freed.

Source: S2-Attention, arXiv 2407.17678, on KV-efficiency (no public code evicts). Row block i reads the sink blocks, its
KV head's stripe and the last L blocks. When i grows by one, exactly block i - L leaves the window, and unless it is a
sink or in the stripe no later row sees it. So a KV head keeps

    ring   the last L + 1 blocks: block j in page j mod (L + 1), the window and one block more (room to step back)
    far    the sinks and the stripe's blocks that left the ring, appended in order

and all heads of a layer have the same two sizes but for one block. Keys are stored rotated, so their order is free: a
decode step reads whole pages in any order (`sparse_decode`); a longer chunk of queries reads them as one sequence, far
pages first, in which the far pages are sinks and the stripe goes on at a shifted residue (`block_sparse`).

Rows of a left-padded batch have their own blocks, counted from their first real token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from lcpatch_kernels import BlockSparseSpec

from ..core.errors import UnsupportedModelError
from ..hf.layers import num_kv_heads_of, state_of
from ..hf.models import attention_modules, unwrap
from ..hf.watch import Call, attend, watch
from .cache import LongCache, caches, stock_layers
from .growing import DenseLayer
from .layer import AttendingLayer, decode, negative
from .rows import alike, as_index, to_list
from .s2_blocks import KeptBlocks
from .untrusted import fitting, whole, wholes

FAR_GRAIN = 16  # pages by which the far store grows: 1,024 tokens of blocks of 64


@caches.register("s2")
class S2Cache(LongCache):
    """The cache for a model patched with `s2`: `model.generate(**inputs, past_key_values=S2Cache(model))`.

    Gives the logits that any full cache gives, up to rounding. Sparse layers keep (L + 1) + N / V blocks of N, dense
    layers all, layers with a window of their own their window. For inference. Which tokens are pads is learnt where a
    row begins and checked with every longer chunk; a mask that hides old tokens from a single new one is not looked at.

    Args:
        model: a model that `lcpatch.apply(model, "s2", …)` patched, stripes shared by a KV head's query heads.

    Raises:
        UnsupportedModelError: the model is not patched with `s2`, or its pattern frees nothing per KV head
            (share="query_head", dense heads).
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        modules = {n: m for n, m in attention_modules(base).items() if state_of(m) is not None}
        if not any(state_of(m).spec is not None for m in modules.values()):
            raise UnsupportedModelError(
                "S2Cache needs a model patched with s2: lcpatch.apply(model, 's2') first, or --method s2"
            )
        layers = stock_layers(base.config, modules, "S2Cache")
        for index, module in modules.items():
            state = state_of(module)
            if state.spec is None:
                if type(layers[index]) is DynamicLayer:
                    layers[index] = DenseLayer()
                continue
            if state.mode != "always":
                raise UnsupportedModelError(
                    f"S2Cache: layer {index} is sparse only in mode={state.mode!r}; use 'always'"
                )
            layers[index] = S2Layer(state.spec, num_kv_heads_of(module.config, index))
        super().__init__(layers=layers)
        watch(modules)


class S2Layer(AttendingLayer):
    """One sparse layer: the pages of every (row, KV head), and which of them hold what."""

    owner = "S2Cache"
    again = "as long as that keeps its patch (lcpatch.apply(model, 's2'), then a new S2Cache(model))"

    def __init__(self, spec: BlockSparseSpec, num_kv_heads: int) -> None:
        super().__init__()
        self.spec, self.blocks = spec, KeptBlocks(spec, num_kv_heads)

    def _clear(self) -> None:
        super()._clear()
        self.gone: list[int] = []  # per row: blocks that left the ring, all of 0 … gone - 1
        self._pages: tuple[Tensor, Tensor] | None = None  # [B, K, pages, block, D]: ring, then far
        self._lists: tuple[Tensor, Tensor] | None = None  # sparse_decode's slots and num_keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads = key_states.shape[:2]
        self.gone = [0] * batch
        self._pages = tuple(
            x.new_zeros(batch, heads, self.blocks.ring, self.blocks.size, x.shape[3])
            for x in (key_states, value_states)
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: rows would then need blocks that are freed already.
        """
        tokens_to_remove = negative(tokens_to_remove)
        for row, pads in enumerate(self.pads):
            first = max(self.blocks.of(self.seen + tokens_to_remove - pads) - (self.blocks.ring - 2), 0)
            if first < self.gone[row]:
                raise ValueError(
                    f"crop({tokens_to_remove}): row {row} would need block {first} again, which is freed; "
                    f"S2Cache can step back at most one block of {self.blocks.size} tokens"
                )
        self.seen = max(self.seen + tokens_to_remove, 0)
        if self.seen == 0:
            self.pads = [0] * len(self.pads)
        self._lists = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = to_list(indices)
        self.pads, self.gone = [self.pads[r] for r in rows], [self.gone[r] for r in rows]
        self._pages = tuple(x.index_select(0, indices.to(x.device)) for x in self._pages)
        self._lists = None

    def memory(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(x.untyped_storage().nbytes() for x in self._pages or ())

    def kept_of_rows(self) -> list[tuple[int, int]]:
        """`(kept, seen)` of each row, in tokens that are no pads; of the KV head that keeps most."""
        rows = []
        for pads, gone in zip(self.pads, self.gone, strict=True):
            freed, seen = gone - self.blocks.most_far(gone), max(self.seen - pads, 0)
            rows.append((seen - freed * self.blocks.size, seen))
        return rows

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        numbers = {"seen": self.seen, "pads": self.pads, "gone": self.gone}
        return dict(zip(("keys", "values"), self._pages, strict=True)), numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of such a layer gave; `like` is an empty tensor [1, K, 0, D] as the model's keys.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        pads = wholes(numbers, "pads")
        seen, gone = whole(numbers, "seen"), wholes(numbers, "gone", len(pads))
        for row, (before, blocks) in enumerate(zip(pads, gone, strict=True)):
            if blocks != self.blocks.left(seen - before, blocks) or blocks > max(self.blocks.of(seen - before), 0):
                raise ValueError(f"row {row}: {blocks} blocks cannot have left the ring after {seen - before} tokens")
        self.lazy_initialization(like.expand(len(pads), -1, -1, -1), like)
        page = like[..., None, :].expand(-1, -1, -1, self.blocks.size, -1)
        found = fitting(tensors, {"keys": page, "values": page}, len(pads), None)
        ring, far = self.blocks.ring, max(map(self.blocks.most_far, gone))
        if found["keys"].shape[2] < ring + far:
            raise ValueError(f"{found['keys'].shape[2]} pages cannot hold {ring} of the ring and {far} far ones")
        self.seen, self.pads, self.gone, self._pages = seen, pads, gone, (found["keys"], found["values"])

    # Attention over what is kept.

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries, and storing of its keys; see `hf.watch.Call`."""
        if call.spec != self.spec:
            raise ValueError("S2Cache: the model's patch is not the one that this cache was made for; make a new cache")
        new, num_queries = self._begin(call), call.query.shape[2]
        if self.seen == 0:
            out = attend(call)
            self._store_chunk(*new)
        elif num_queries == 1:
            self._store_token(*new)
            out = self._decode(call)
        else:
            out = self._attend_chunk(call, *new)
            self._store_chunk(*new)
        return out

    def _decode(self, call: Call) -> tuple[Tensor, Tensor]:
        """One token a row: every page that is kept, the row's newest page last and partly filled."""
        slots, num_keys = self._lists or self._make_lists()
        keys, values = (x.flatten(2, 3) for x in self._pages)
        return decode(call, keys, values, slots=slots, num_keys=num_keys, page_size=self.blocks.size)

    def _make_lists(self) -> tuple[Tensor, Tensor]:
        """`slots` [B, K, pages] and `num_keys` [B, K] of a decode step. They change once a block; in between a row's
        count grows by one a token."""
        lists, counts = [], []
        for row, gone in enumerate(self.gone):
            tokens = max(self.seen - self.pads[row], 0)
            unfilled = -tokens % self.blocks.size
            for head in range(len(self.blocks.rules)):
                lists.append(self.blocks.pages(head, gone, tokens))
                counts.append(len(lists[-1]) * self.blocks.size - unfilled)
        most = max(len(pages) for pages in lists)
        padded = [pages + [-1] * (most - len(pages)) for pages in lists]
        shape = (len(self.pads), len(self.blocks.rules))
        slots = torch.tensor(padded, dtype=torch.int32).view(*shape, most).to(self.device)
        self._lists = slots, torch.tensor(counts, dtype=torch.int32).view(shape).to(self.device)
        return self._lists

    def _attend_chunk(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Several queries a row: for every KV head the far pages, the ring in order, and the chunk, as one sequence."""
        query = call.query.unflatten(1, (len(self.blocks.rules), -1))  # [B, K, H // K, T, D]
        out, lse = torch.zeros_like(query), torch.full(query.shape[:-1], -torch.inf, device=query.device)
        lse = lse.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        for rows in self._alike():
            gone, skip = self.gone[rows[0]], max(self.pads[rows[0]] - self.seen, 0)
            if skip >= query.shape[3]:  # nothing but pads so far
                continue
            recent = tuple(self._recent(rows, pages, x) for pages, x in zip(self._pages, (keys, values), strict=True))
            for head in range(len(self.blocks.rules)):
                one, far = slice(head, head + 1), self._far(head, gone)
                k, v = (
                    torch.cat([x[rows, one, far].flatten(2, 3), r[:, one]], 2)
                    for x, r in zip(self._pages, recent, strict=True)
                )
                spec = BlockSparseSpec.of([self.blocks.rule_over(head, gone)] * query.shape[2], self.blocks.size)
                part = attend(call._replace(query=query[rows, head, :, skip:], key=k, value=v, spec=spec, bounds=None))
                out[rows, head, :, skip:], lse[rows, head, :, skip:] = part[0], part[1].to(lse.dtype)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def _recent(self, rows: list[int], pages: Tensor, new: Tensor) -> Tensor:
        """The tokens of `rows` (which are alike) from the ring's first block on, the new ones last: [rows, K, n, D]."""
        gone, pads = self.gone[rows[0]], self.pads[rows[0]]
        ring, size, length = self.blocks.ring, self.blocks.size, max(self.seen - pads, 0)
        blocks = [j % ring for j in range(gone, -(-length // size))]
        near = pages[:, :, :ring][rows][:, :, blocks].flatten(2, 3)[:, :, : length - gone * size]
        return torch.cat([near, new[rows][:, :, max(pads - self.seen, 0) :]], 2)

    # Storing.

    def _store_chunk(self, keys: Tensor, values: Tensor) -> None:
        """Store any number of tokens: blocks that fall out of the ring go to the far store or nowhere."""
        seen = self.seen + keys.shape[2]
        after = {}
        for rows in self._alike():
            after[rows[0]] = self.blocks.left(seen - self.pads[rows[0]], self.gone[rows[0]])
        self._reserve(max(map(self.blocks.most_far, after.values())))
        for rows in self._alike():
            gone, leaving_to = self.gone[rows[0]], after[rows[0]]
            for pages, new in zip(self._pages, (keys, values), strict=True):
                recent = self._recent(rows, pages, new)
                for head in range(len(self.blocks.rules)):
                    self._move_far(pages, rows, head, gone, leaving_to, recent[:, head])
                self._fill_ring(pages, rows, leaving_to, recent[:, :, (leaving_to - gone) * self.blocks.size :])
            for row in rows:
                self.gone[row] = leaving_to
        self.seen, self._lists = seen, None

    def _move_far(self, pages: Tensor, rows: list[int], head: int, gone: int, to: int, recent: Tensor) -> None:
        """Append what the far store wants of the blocks gone … to - 1; `recent` [rows, n, D] begins at block `gone`."""
        wanted = [j - gone for j in range(gone, to) if self.blocks.is_far(head, j)]
        if not wanted:
            return
        blocks = recent[:, : (to - gone) * self.blocks.size].unflatten(1, (-1, self.blocks.size))[:, wanted]
        start = self._far(head, gone).stop
        pages[rows, head, start : start + len(wanted)] = blocks

    def _fill_ring(self, pages: Tensor, rows: list[int], first: int, tokens: Tensor) -> None:
        """Write `tokens` [rows, K, n, D], which begin at block `first`, into their pages."""
        for j, part in enumerate(tokens.split(self.blocks.size, 2), first):
            pages[rows, :, j % self.blocks.ring, : part.shape[2]] = part

    def _store_token(self, keys: Tensor, values: Tensor) -> None:
        """Store one token a row: no block is read again but at a block's first token."""
        new_block = False
        for rows in self._alike():
            position = self.seen - self.pads[rows[0]]
            block, offset = divmod(position, self.blocks.size)
            if offset == 0:
                new_block = True
                self._open_block(rows, block)
            which = as_index(rows, len(self.pads), self.device)
            for pages, new in zip(self._pages, (keys, values), strict=True):
                page = pages[:, :, block % self.blocks.ring, offset]
                page[which] = new[which, :, 0]
        self.seen += 1
        if new_block:
            self._lists = None
        elif self._lists is not None:
            self._lists = self._lists[0], self._lists[1] + 1

    def _open_block(self, rows: list[int], block: int) -> None:
        """Make the page of a new block free: the block that it holds goes to the far store or nowhere."""
        gone = self.gone[rows[0]]
        if block - (self.blocks.ring - 1) <= gone:
            return
        self._reserve(self.blocks.most_far(gone + 1))
        for pages in self._pages:
            for head in range(len(self.blocks.rules)):
                self._move_far(pages, rows, head, gone, gone + 1, pages[rows, head, gone % self.blocks.ring])
        for row in rows:
            self.gone[row] = gone + 1

    def _reserve(self, num_far: int) -> None:
        """Make room for `num_far` pages in the far store of every head."""
        missing = self.blocks.ring + num_far - self._pages[0].shape[2]
        if missing > 0:
            extra = max(-(-missing // FAR_GRAIN) * FAR_GRAIN, (self._pages[0].shape[2] - self.blocks.ring) // 2)
            self._pages = tuple(torch.cat([x, x.new_zeros(*x.shape[:2], extra, *x.shape[3:])], 2) for x in self._pages)

    def _alike(self) -> list[list[int]]:
        """Rows with equal pads have equal blocks."""
        return alike(zip(self.pads, self.gone, strict=True))

    def _far(self, head: int, gone: int) -> slice:
        """The far pages of a head."""
        return slice(self.blocks.ring, self.blocks.ring + self.blocks.num_far(head, gone))
