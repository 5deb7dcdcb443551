"""RetroLM's cache: nothing is forgotten, and every new token looks up the pages of the past that fit its query.

Source: arXiv 2502.11444 (pages of 128 tokens, retrieval per layer, the rest may live on the CPU). Departures:

- The paper retrieves once for every user query; here each generated token retrieves for itself, per KV head.
- Its prompt streams through retrieved pages; here several tokens at a time (a prompt, its chunks, a later turn) attend
  to everything, so that nothing is lost while reading.
- Scores are trained there ("bookmark"); "quest" and "mean" need no training, and "bookmark" begins as "mean".

Scores of the query heads that share a KV head are put together by their maximum, or by the sum of their softmaxes;
averaging the queries first would lose what one head alone looks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..hf.watch import Call, attend
from .budget import Budget
from .layer import AttendingLayer, DenseLayer, LongCache, caches, decode, negative, routed_layers, to_list
from .pages import Pages, alike
from .scattered import is_dense
from .scorers import Scorer, make_scorers
from .state import fitting, whole, wholes

GROUPS = ("max", "softmax")


@caches.register("retrieval")
class RetrievalCache(LongCache):
    """`model.generate(**inputs, past_key_values=RetrievalCache(model, budget=2048))`: a token reads the pages that fit.

    Args:
        model: a causal language model of transformers, patched or not.
        budget: tokens that a generated token attends to per KV head, in whole pages; a float is a share of the row's.
        scorer: "quest", "mean", "bookmark", a scorer's class, or `caches.scorers.Bookmarks` that were trained.
        page: tokens a page, a power of two.
        num_sinks, recent: tokens at the row's begin and end whose pages are always read.
        group: how the scores of a KV head's query heads are put together: "max", or "softmax" (their sum).
        dense_layers: so many of the first layers read everything (Quest's choice is 2).

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        UnknownNameError: no such scorer.
        ValueError: options out of range, or a budget that the pages always read fill.
    """

    chunks_differ = "one token attends to its pages only, several at a time to everything"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float = 2048,
        *,
        scorer: Any = "quest",
        page: int = 128,
        num_sinks: int = 4,
        recent: int = 128,
        group: str = "max",
        dense_layers: int = 0,
    ) -> None:
        reads = Reads(budget, page, num_sinks, recent)
        if group not in GROUPS:
            raise ValueError(f"group={group!r} is not one of {', '.join(map(repr, GROUPS))}")
        by_layer = make_scorers(scorer, model.config.get_text_config().num_hidden_layers)

        def make(index: int, module: nn.Module) -> Any:
            return DenseLayer() if index < dense_layers else RetrievalLayer(reads, by_layer[index], group)

        super().__init__(layers=routed_layers(model, "RetrievalCache", make))

    def stats(self) -> dict[str, Any]:
        """Besides what every cache says: tokens that the last generated token attended to, the most of a layer."""
        read = [layer.read for layer in self.layers if hasattr(layer, "read")]
        return {**super().stats(), "attended": max(read, default=0)}


class Reads:
    """How many pages a token of a row reads, and which of them always.

    Raises:
        ValueError: options out of range, or a budget that the pages always read fill.
    """

    def __init__(self, budget: int | float, page: int, num_sinks: int, recent: int) -> None:
        if not isinstance(page, int) or page < 1 or page & (page - 1):
            raise ValueError(f"page={page!r} must be a power of two")
        if not isinstance(recent, int) or recent < 1:
            raise ValueError(f"recent={recent!r} must be tokens (an integer >= 1)")
        self.budget = Budget(budget, num_sinks, recent)
        self.page, self.recent = page, recent
        self.sink_pages = -(-num_sinks // page)
        self.least = (
            self.sink_pages + -(-recent // page) + 2
        )  # recent tokens may begin within a page; and one to choose
        if isinstance(budget, int) and budget < self.least * page:
            raise ValueError(
                f"budget={budget} must hold the pages of {num_sinks} sinks and {recent} recent tokens and one more: at "
                f"least {self.least * page} with page={page}, or smaller pages"
            )

    def of(self, real: int) -> int:
        """The pages that a row of `real` tokens reads."""
        return max(self.budget.of(real) // self.page, self.least)


class RetrievalLayer(AttendingLayer):
    """One layer: all pages, what each is remembered by, and the choice among them."""

    owner = "RetrievalCache"

    def __init__(self, reads: Reads, scorer: Scorer, group: str, **kwargs: Any) -> None:
        self.reads, self.scorer, self.group = reads, scorer, group
        super().__init__(**kwargs)

    def _clear(self) -> None:
        super()._clear()
        self.pages = self._make_pages()
        self.summary: tuple[Tensor, ...] = ()  # of full pages, [B, K, pages, …]
        self.budgets: list[int] = []  # per row: pages to read, as they were after the last step of several tokens
        self.read = 0  # tokens that the last generated token attended to, the most of a row
        self._marks: Marks | None = None

    def _make_pages(self) -> Pages:
        return Pages(self.reads.page)

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries: one token's over the pages that fit, several tokens' over everything."""
        keys, values = self._begin(call)
        num = keys.shape[2]
        skip = [min(max(pads - self.seen, 0), num) for pads in self.pads]
        for rows, begin, end in self.pages.append(keys, values, skip):
            self._remember(rows, begin, end)
        self.seen += num
        lengths = self.pages.lengths
        if num > 1 or not self.budgets:
            self.budgets = [self.reads.of(n) for n in lengths]
            self._marks = None
        over = any(-(-n // self.reads.page) > most for n, most in zip(lengths, self.budgets, strict=True))
        if num == 1 and over and is_dense(call.spec):
            return self._retrieve(call)
        self.read = max(lengths)
        everything = self.pages.whole()
        spans = [[num - min(num, n), num, 0, n] for n in lengths]
        bounds = torch.tensor(spans, dtype=torch.int32).to(self.device)
        if num == 1:
            return decode(call, *everything, spec=call.spec, bounds=bounds[:, 2:].contiguous())
        return attend(call._replace(key=everything[0], value=everything[1], bounds=bounds[:, None]))

    def _retrieve(self, call: Call) -> tuple[Tensor, Tensor]:
        marks = self._mark()
        pages = self.choose(call.query, marks)
        keys, values, slots = self.pages.fetch(pages)
        self.read = self.reads.page * slots.shape[2]
        which = {"slots": slots, "num_keys": marks.num_keys, "page_size": self.reads.page}
        return decode(call, keys, values, **which)

    def choose(self, query: Tensor, marks: Marks) -> Tensor:
        """The pages [B, K, M] that `query` reads, int64, -1 for none; each row's newest page comes last."""
        most = marks.last
        scores = self.scorer.score(query, tuple(x[:, :, :most] for x in self.summary))
        scores = scores.unflatten(1, (self.summary[0].shape[1], -1))  # [B, K, H // K, pages]
        place = torch.arange(most, device=scores.device)
        none = (place >= marks.newest)[:, :, None]
        scores = scores.masked_fill(none, -torch.inf)
        if self.group == "softmax":
            scores = (
                (scores * query.shape[-1] ** -0.5)
                .softmax(-1)
                .nan_to_num()
                .sum(2)
                .masked_fill(none[:, :, 0], -torch.inf)
            )
        else:
            scores = scores.amax(2)
        always = ((place < self.reads.sink_pages) | (place >= marks.recent)) & (place < marks.newest)
        scores, pages = scores.masked_fill(always, torch.inf).topk(min(marks.chosen, most), -1)
        rank = torch.arange(pages.shape[-1], device=pages.device)
        pages = pages.masked_fill((scores == -torch.inf) | (rank >= marks.budgets - 1), -1)
        pages = pad(pages, (0, marks.chosen - pages.shape[-1]), value=-1)
        return torch.cat([pages, marks.newest.expand(*pages.shape[:2], 1)], -1)

    def _mark(self) -> Marks:
        """What the choice needs of the rows' lengths, on the device; rebuilt when a page begins, else counted on."""
        page, lengths = self.reads.page, self.pages.lengths
        state = [((n - 1) // page, (n - self.reads.recent) // page) for n in lengths]
        marks = self._marks
        if marks is not None and marks.state == state and marks.lengths == [n - 1 for n in lengths]:
            marks.num_keys.add_(1)
            marks.lengths = list(lengths)
            return marks
        self._marks = Marks(lengths, state, self.budgets, page, self.pages.num_heads, self.device)
        return self._marks

    def _remember(self, rows: list[int], begin: int, end: int) -> None:
        new = self.scorer.summarise(self.pages.tokens(rows, begin, end), self.reads.page)
        if not self.summary:
            self.summary = tuple(x.new_zeros(len(self.pads), x.shape[1], 0, *x.shape[3:]) for x in new)
        if (missing := self.pages.room - self.summary[0].shape[2]) > 0:
            self.summary = tuple(
                torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2) for x in self.summary
            )
        for own, x in zip(self.summary, new, strict=True):
            own[rows, :, begin:end] = x

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` takes: tensors, and numbers as JSON."""
        tensors, numbers = self.pages.state()
        return tensors, {**numbers, "seen": self.seen, "pads": self.pads, "budgets": self.budgets}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any], like: Tensor) -> None:
        """Hold what `state` of such a layer gave; `like` is an empty tensor [1, K, 0, D] as the model's keys.

        Raises:
            ValueError: tensors or numbers that do not fit.
        """
        pads, seen = wholes(numbers, "pads"), whole(numbers, "seen")
        lengths = [max(seen - n, 0) for n in pads]
        found = fitting(tensors, {"keys": like, "values": like}, len(pads), max(lengths))
        self.lazy_initialization(like.expand(len(pads), -1, -1, -1), like)
        self.pages.load(found["keys"], found["values"], lengths, numbers)
        self.seen, self.pads = seen, pads
        self.budgets = wholes(numbers, "budgets", len(pads), self.reads.of(max(lengths)))
        for rows in alike(lengths):
            if (full := lengths[rows[0]] // self.reads.page) > 0:
                self._remember(rows, 0, full)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        num = min(-negative(tokens_to_remove), self.seen)
        if not self.is_initialized or not num:
            return
        self.seen -= num
        self.pages.cut([max(self.seen - pads, 0) for pads in self.pads])
        if self.seen == 0:
            self.pads, self.budgets = [0] * len(self.pads), []
        self._marks = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = to_list(indices)
        self.pads = [self.pads[r] for r in rows]
        self.budgets = [self.budgets[r] for r in rows] if self.budgets else []
        self.pages.select_rows(rows)
        self.summary = tuple(x[rows] for x in self.summary)
        self._marks = None

    def tiers(self) -> dict[str, int]:
        """Bytes per tier."""
        held = self.pages.nbytes()
        return {**held, "device": held["device"] + sum(x.untyped_storage().nbytes() for x in self.summary)}

    def memory(self) -> int:
        """Bytes of all tiers."""
        return sum(self.tiers().values())

    def kept(self) -> int:
        """Tokens of the longest row: all."""
        return max(self.pages.lengths, default=0)


class Marks:
    """Where each row's newest page is, and what else the choice of pages needs of it, as tensors [B, 1, 1].

    Args:
        lengths: tokens of each row.
        state: of each row its newest page and the first of its recent ones, -1 or less: none.
        budgets: pages that each row reads.
        page, num_heads, device: of the pages.
    """

    def __init__(
        self,
        lengths: list[int],
        state: list[tuple[int, int]],
        budgets: list[int],
        page: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.lengths, self.state = list(lengths), state
        self.last = max(newest for newest, _ in state)
        self.chosen = max(budgets) - 1
        counts = [self.chosen * page + n - newest * page for n, (newest, _) in zip(lengths, state, strict=True)]
        rows = [[newest, recent, most, n] for (newest, recent), most, n in zip(state, budgets, counts, strict=True)]
        table = torch.tensor(rows).to(device)
        self.newest, self.recent, self.budgets = (table[:, n, None, None] for n in range(3))
        self.num_keys = table[:, 3:].expand(-1, num_heads).to(torch.int32).contiguous()
