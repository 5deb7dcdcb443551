"""A layer that keeps every page of its past and reads, for each generated token, those that an index picks.

Several tokens at a time (a prompt, its chunks, a later turn) attend to everything. The pages may lie on the device
(`Pages`) or mostly elsewhere (`TieredPages`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..hf.watch import Call, attend
from .cache import LongCache
from .index import Index
from .layer import AttendingLayer, decode, negative
from .marks import Marks, Now
from .pages import Filled, Pages
from .reads import Reads
from .recall import recall
from .rows import alike, to_list
from .scattered import is_dense
from .tiers import TieredPages, traffic
from .untrusted import fitting, whole, wholes


class PagedCache(LongCache):
    """Base of the caches that are made of such layers."""

    chunks_differ = "one token attends to its pages only, several at a time to everything"

    def stats(self, measure: bool = False) -> dict[str, Any]:
        """Besides what every cache says:

        `attended`: tokens that the last generated token attended to, the most of a layer. Where pages lie on several
        tiers, `hit_rate`: which share of the pages asked for was on the fast tier, or on its way there; and
        `fetched_ahead`, `from_host`, `from_disk`: pages. With `measure`, which share of the full attention the last
        token's pages hold, see `caches.recall.recall`; what that reads counts nowhere.
        """
        told = super().stats()  # layers that generate in fixed buffers know only then what they did
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        told["attended"] = max((layer.read for layer in layers), default=0)
        if stores := [layer.pages for layer in layers if layer.pages.apart]:
            told |= traffic(stores)
        return told | (recall(self.layers) if measure else {})


class PagedLayer(AttendingLayer):
    """One layer.

    Args:
        reads: how many pages a token reads.
        make_index, make_pages: an empty index for so many rows, and an empty store of pages.
    """

    def __init__(
        self,
        reads: Reads,
        make_index: Callable[[Reads, int], Index],
        make_pages: Callable[[], Pages | TieredPages],
    ) -> None:
        self.reads, self.make_index, self.make_pages = reads, make_index, make_pages
        self.next: Callable[[], PagedLayer | None] | None = None
        super().__init__()

    def follow(self, layer: PagedLayer) -> None:
        """Fetch ahead by the query of `layer`, the one before."""
        layer.next = weakref.ref(self)

    def _clear(self) -> None:
        super()._clear()
        self.pages = self.make_pages()
        self.budgets: list[int] = []  # per row: pages to read, as they were after the last step of several tokens
        self.online: list[bool] = []  # per row: whether none has come, so that they are of the tokens seen so far
        self.read = 0  # tokens that the last generated token attended to, the most of a row
        self.index = self.make_index(self.reads, 0)
        self._marks: Marks | None = None
        self._asked: tuple[Call, Tensor] | None = None  # the last generated token's query and lse, for `recalled`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.index = self.make_index(self.reads, key_states.shape[0])
        self.pages.lengths = [0] * key_states.shape[0]
        self.online = [self.reads.budget.is_share] * key_states.shape[0]

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries: one token's over the pages that fit, several tokens' over everything."""
        keys, values = self._begin(call)
        num = keys.shape[2]
        skip = [min(max(pads - self.seen, 0), num) for pads in self.pads]
        self._count(num, skip)
        self.pages.allow(self.budgets)
        self._fill_index(self.pages.append(keys, values, skip))
        self.seen += num
        if num == 1 and is_dense(call.spec) and (self.pages.apart or self._over()):
            out, lse = self._retrieve(call)
            self._fill_index(self.pages.close())
        else:
            self._fill_index(self.pages.close())
            out, lse = self._read_all(call)
        self._asked = (call._replace(key=None, value=None, bounds=None, sinks=None), lse) if num == 1 else None
        return out, lse

    def _fill_index(self, filled: Iterable[Filled]) -> None:
        for rows, begin, keys in filled:
            self.index.append(keys, rows, begin, self.pages.room)

    def _count(self, num: int, skip: list[int]) -> None:
        """Set the budgets for a step of `num` tokens, of which each row skips some."""
        self.online = [on and num - s < 2 for on, s in zip(self.online, skip, strict=True)]
        anew = num > 1 or not self.budgets
        if not anew and not any(self.online):
            return
        budgets = [self.reads.of(n + num - s) for n, s in zip(self.pages.lengths, skip, strict=True)]
        if not anew:
            budgets = [now if on else old for now, on, old in zip(budgets, self.online, self.budgets, strict=True)]
        if anew or budgets != self.budgets:
            self.budgets, self._marks = budgets, None

    def _read_all(self, call: Call) -> tuple[Tensor, Tensor]:
        num, lengths = call.query.shape[2], self.pages.lengths
        self.read = max(lengths)
        everything = self.pages.whole()
        spans = [[num - min(num, n), num, 0, n] for n in lengths]
        bounds = torch.tensor(spans, dtype=torch.int32).to(self.device)
        if num == 1:
            return decode(call, *everything, spec=call.spec, bounds=bounds[:, 2:].contiguous())
        return attend(call._replace(key=everything[0], value=everything[1], bounds=bounds[:, None]))

    def look_ahead(self, query: Tensor) -> None:
        """Begin to fetch what `query`, the one of the layer before, would choose here."""
        ready = self._marks is not None and self.pages.apart and self._over()
        if ready and query.shape[1] % self.pages.num_heads == 0 and query.shape[3] == self.pages.keys.shape[3]:
            self.pages.prefetch(self.choose(query.to(self.device), self._marks))

    def choose(self, query: Tensor, marks: Marks, scale: float | None = None) -> Tensor:
        """The pages [B, K, M] that `query` reads, int64, -1 for none; each row's newest page comes last."""
        if self._over():
            scores = self.index.scores(query.to(self.dtype), marks, scale)  # autocast leaves q in fp32
            if marks.some_whole:
                scores = scores.masked_fill(marks.newest < marks.budgets, 0)
        else:
            scores = torch.zeros(len(self.pads), self.pages.num_heads, marks.most, device=self.device)
        return self._best(scores, marks)

    def _best(self, scores: Tensor, marks: Marks | Now) -> Tensor:
        """The pages with the highest scores [B, K, pages], beside those that are always read; as `choose`."""
        scores, pages = (
            scores.masked_fill(marks.always, torch.inf).masked_fill(~marks.real, -torch.inf).topk(marks.chosen)
        )
        pages = pages.masked_fill((scores == -torch.inf) | marks.beyond, -1)
        return torch.cat([pages, marks.newest.expand(*pages.shape[:2], 1)], -1)

    def _limits(self, lengths: list[int]) -> list[int]:
        """How many pages the newest token of rows of so many reads at most."""
        return self.budgets

    def _over(self) -> bool:
        """Whether a row has more pages than it may read."""
        page, lengths = self.reads.page, self.pages.lengths
        return any(-(-n // page) > most for n, most in zip(lengths, self._limits(lengths), strict=True))

    def _retrieve(self, call: Call) -> tuple[Tensor, Tensor]:
        marks = self._mark()
        keys, values, slots = self.pages.fetch(self.choose(call.query, marks, call.scale), marks.newest)
        if self.next is not None and (layer := self.next()) is not None:
            layer.look_ahead(call.query)
        self.read = min(self.reads.page * slots.shape[2], max(self.pages.lengths))
        which = {"slots": slots, "num_keys": marks.num_keys, "page_size": self.reads.page}
        return decode(call, keys, values, **which)

    def _mark(self) -> Marks:
        """What the choice needs of the rows' lengths, on the device; rebuilt when a page begins, else counted on."""
        page, lengths = self.reads.page, self.pages.lengths
        state = [((n - 1) // page, (n - self.reads.recent) // page) for n in lengths]
        marks = self._marks
        if marks is not None and marks.state == state and marks.lengths == [n - 1 for n in lengths]:
            marks.num_keys.add_(1)
            marks.lengths = list(lengths)
            return marks
        self._marks = Marks(lengths, state, self._limits(lengths), self.reads, self.pages.num_heads, self.device)
        return self._marks

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        tensors, numbers = self.pages.state()
        if not self.pages.lossless:  # its keys are no longer what the index knows of them
            tensors |= self.index.state(max(self.pages.lengths) // self.reads.page, tensors["keys"][:, :, :0])
        online = [int(on) for on in self.online]
        return tensors, {**numbers, "seen": self.seen, "pads": self.pads, "budgets": self.budgets, "online": online}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of such a layer gave; `like` is an empty tensor [1, K, 0, D] as the model's keys.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        pads, seen = wholes(numbers, "pads"), whole(numbers, "seen")
        lengths = [max(seen - n, 0) for n in pads]
        self.lazy_initialization(like.expand(len(pads), -1, -1, -1), like)
        self.seen, self.pads = seen, pads
        if seen:  # a row cropped to nothing counts anew
            self.budgets = wholes(numbers, "budgets", len(pads))  # of a longer text, if some was cropped
            if min(self.budgets) < self.reads.least:
                raise ValueError(f"budgets={self.budgets} must each be at least {self.reads.least} pages")
        self.online = [bool(on) for on in wholes(numbers, "online", len(pads), 1)]
        self._load_pages(tensors, numbers, lengths, like)

    def _load_pages(
        self, tensors: dict[str, Tensor], numbers: dict[str, Any], lengths: list[int], like: Tensor
    ) -> None:
        if not self.pages.lossless:
            self._restore_pages(tensors, numbers, lengths, like)
            return
        found = fitting(tensors, {"keys": like, "values": like}, len(lengths), max(lengths))
        self.pages.allow(self.budgets or [self.reads.least] * len(lengths))
        self.pages.load(found["keys"], found["values"], lengths, numbers)
        for rows in alike(lengths):
            if (full := lengths[rows[0]] // self.reads.page) > 0:
                keys = found["keys"][rows, :, : full * self.reads.page]
                self.index.append(keys, rows, 0, self.pages.room)

    def _restore_pages(
        self, tensors: dict[str, Tensor], numbers: dict[str, Any], lengths: list[int], like: Tensor
    ) -> None:
        """The same where pages lost something: those that left stay as they lie, and what was known of them too."""
        full, likes = [n // self.reads.page for n in lengths], self.index.likes(like)
        known = {name: x for name, x in tensors.items() if name in likes}
        known = fitting(known, likes, len(lengths), max(full))
        self.pages.restore({name: x for name, x in tensors.items() if name not in likes}, lengths, numbers, like)
        for rows in alike(full):
            if end := full[rows[0]]:
                self.index.append_known({name: x[rows, :, :end] for name, x in known.items()}, rows, self.pages.room)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        num = min(-negative(tokens_to_remove), self.seen)
        if not self.is_initialized or not num:
            return
        self.seen -= num
        lengths = [max(self.seen - pads, 0) for pads in self.pads]
        self.pages.cut(lengths)
        for row, length in enumerate(lengths):
            self.index.cut(row, length // self.reads.page)
        if self.seen == 0:
            self.pads, self.budgets = [0] * len(self.pads), []
            self.online = [self.reads.budget.is_share] * len(self.pads)
        self._marks = self._asked = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = to_list(indices)
        self.pads = [self.pads[r] for r in rows]
        self.budgets = [self.budgets[r] for r in rows] if self.budgets else []
        self.online = [self.online[r] for r in rows]
        self.pages.select_rows(rows)
        self.index.select_rows(rows)
        self._marks = None
        if self._asked is not None:
            call, lse = self._asked
            self._asked = call._replace(query=call.query[rows]), lse[rows]

    def tiers(self) -> dict[str, int]:
        """Bytes per tier."""
        held = self.pages.nbytes()
        asked = () if self._asked is None else (self._asked[0].query, self._asked[1])
        last = sum(x.untyped_storage().nbytes() for x in asked)
        return {**held, "device": held["device"] + self.index.nbytes + last}

    def memory(self) -> int:
        """Bytes of all tiers."""
        return sum(self.tiers().values())

    def kept_of_rows(self) -> list[tuple[int, int]]:
        """`(kept, seen)` of each row, in tokens that are no pads: all."""
        return [(length, length) for length in self.pages.lengths]

    def recalled(self) -> Tensor | None:
        """Which share of the full softmax the keys read by the last generated token hold: [B, H], fp32 (float64 for
        float64), NaN for a row without keys; None where the last step was no generated token. See `recall.recall`.

        One more attention of that token, over everything: sum over its keys of exp(score) is exp(lse) in both. What is
        read for it is no hit and no miss.
        """
        if self._asked is None:
            return None
        call, lse = self._asked
        bounds = torch.tensor([[0, n] for n in self.pages.lengths], dtype=torch.int32).to(self.device)
        _, full = decode(call, *self.pages.look(), spec=call.spec, bounds=bounds)
        return (lse - full).exp().clamp(max=1)[..., 0]
