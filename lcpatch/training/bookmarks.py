"""Trains the page scorer "bookmark" of retrieval caches on any text: the model's own attention says which page matters.

Source: RetroLM, arXiv 2502.11444 (stage 1: the backbone is frozen, only the bookmarks' projections learn, by contrast).
Departure: the paper takes question and passage pairs as labels. Here the label of a query is the share of its
attention that each page before it gets, per layer and head; the loss is the cross-entropy of the scores against those
shares. Pages that are always read (sinks, the newest ones) are left out, and a query counts by the mass of the others.
Stage 2, the language-model loss over retrieved pages, is `bookmarks_lm`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..caches.cache import LongCache, routed_layers
from ..caches.layer import AttendingLayer
from ..caches.scattered import is_dense
from ..caches.scorers import Bookmarks
from ..core.errors import TrainingError
from ..hf.models import evaluating, unwrap
from ..hf.route import is_routed, unroute
from ..hf.watch import Call, attend


def train_bookmarks(
    model: nn.Module,
    texts: Iterable[Tensor],
    *,
    bookmarks: Bookmarks | None = None,
    page: int = 128,
    num_sinks: int = 4,
    recent: int = 128,
    num_queries: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    say: Callable[[int, float, float], None] | None = None,
) -> Bookmarks:
    """Train on one text after the other: one forward of the frozen model and one step of Adam for each.

    Args:
        model: a causal language model of transformers; its weights stay as they are, layers under a pattern left out.
        texts: token ids [B, T] without padding, of several pages each.
        bookmarks: to go on with; None: new ones, which score as the mean does.
        page, num_sinks, recent: as in `RetrievalCache`.
        num_queries: queries of a text that each layer learns from, drawn at random.
        lr, seed: of Adam, and of that draw.
        say: called with the step, its loss, and the share of the attention that the best quarter of the pages holds.

    Returns:
        The bookmarks, for `RetrievalCache(model, scorer=bookmarks)`; `bookmarks.save(path)` writes them.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: a text too short for a page to choose, a model whose layers all follow a pattern, or bookmarks of
            another shape than its heads.
        TrainingError: the loss was not a number.
    """
    bookmarks = placed(Bookmarks.of(model) if bookmarks is None else bookmarks, model)
    optimiser = torch.optim.Adam(bookmarks.parameters(), lr)
    lesson = Lesson(bookmarks, page, num_sinks, recent, num_queries, seed)
    for step, (loss, recall) in enumerate(_lessons(model, texts, lesson)):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} at step {step}; take a lower learning rate than {lr}")
        optimiser.step()
        optimiser.zero_grad()
        if say is not None:
            say(step, loss, recall)
    return bookmarks


def measure_bookmarks(
    model: nn.Module,
    texts: Iterable[Tensor],
    bookmarks: Bookmarks,
    *,
    page: int = 128,
    num_sinks: int = 4,
    recent: int = 128,
    num_queries: int = 64,
    seed: int = 0,
) -> tuple[float, float]:
    """`(loss, recall)` of bookmarks on `texts`, as `train_bookmarks` says them; untrained ones are the mean."""
    copied = placed(copy.deepcopy(bookmarks), model)
    found = list(_lessons(model, texts, Lesson(copied, page, num_sinks, recent, num_queries, seed)))
    return tuple(sum(x) / len(found) for x in zip(*found, strict=True))


def placed(bookmarks: Bookmarks, model: nn.Module) -> Bookmarks:
    """Bookmarks where the model is.

    Raises:
        ValueError: they were made for heads of another shape.
    """
    has, wanted = (
        "{} layers, {} KV heads of {} numbers".format(*x.query.shape[:3]) for x in (bookmarks, Bookmarks.of(model))
    )
    if has != wanted:
        raise ValueError(f"these are bookmarks of {has}, the model has {wanted}: train them on this model")
    return bookmarks.to(next(model.parameters()).device)


def _lessons(model: nn.Module, texts: Iterable[Tensor], lesson: Lesson) -> Iterator[tuple[float, float]]:
    """A forward for each text, which leaves gradients on the bookmarks: its loss and its recall."""
    device = next(model.parameters()).device
    with lent(model):
        for ids in texts:
            if ids.shape[1] < lesson.least:
                raise ValueError(f"a text of {ids.shape[1]} tokens has no page to choose; give {lesson.least} or more")
            lesson.begin()
            with torch.no_grad():
                model(ids.to(device), past_key_values=_LessonCache(model, lesson), logits_to_keep=1)
            if not lesson.losses:
                raise ValueError("every layer follows a pattern, so none reads pages: lcpatch.remove(model) first")
            yield lesson.means()


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """The model frozen and in eval mode, and afterwards as it was, its attention routed to caches or not."""
    routed = is_routed(unwrap(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        if not routed:
            unroute(model)


class Lesson:
    """What every layer learns from a text, and how well it does; see `train_bookmarks`."""

    def __init__(
        self, bookmarks: Bookmarks, page: int, num_sinks: int, recent: int, num_queries: int, seed: int
    ) -> None:
        for name, value, least in (("page", page, 1), ("recent", recent, 0), ("num_sinks", num_sinks, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.bookmarks, self.page, self.sink_pages, self.recent = bookmarks, page, -(-num_sinks // page), recent
        self.num_queries, self.rng = num_queries, torch.Generator().manual_seed(seed)
        self.least = (self.sink_pages + 2) * page + recent  # then the last token has two pages to choose from
        self.begin()

    def begin(self) -> None:
        self.losses: list[Tensor] = []
        self.recalls: list[Tensor] = []

    def means(self) -> tuple[float, float]:
        return tuple(float(torch.stack(x).mean()) for x in (self.losses, self.recalls))

    def learn(self, layer: int, call: Call) -> None:
        """Add this layer's gradients: nothing of it is kept, so memory does not grow with the number of layers."""
        length, page = call.key.shape[2], self.page
        position = torch.randint(self.least - 1, length, (self.num_queries,), generator=self.rng).to(call.key.device)
        query, keys = call.query[:, :, position].detach().float(), call.key.detach().float()
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        pages = torch.arange(length // page, device=keys.device)
        ours = (pages >= self.sink_pages) & (pages < ((position - self.recent) // page)[:, None])  # [queries, pages]
        share = self._attention(query, keys, position, scale, call.softcap)[..., : len(pages) * page]
        share = share.unflatten(-1, (-1, page)).sum(-1).masked_fill(~ours, 0)  # [B, H, queries, pages]
        with torch.enable_grad():
            scores = self.bookmarks.scores(layer, query, keys, page) * scale
            log = scores.masked_fill(~ours, -torch.inf).log_softmax(-1).masked_fill(~ours, 0)
            loss = -(share * log).sum() / share.sum()
            loss.backward()
        self.losses.append(loss.detach())
        best = log.detach().masked_fill(~ours, -torch.inf).topk(max(len(pages) // 4, 1), -1).indices
        self.recalls.append(share.gather(-1, best).sum() / share.sum())

    @staticmethod
    def _attention(query: Tensor, keys: Tensor, position: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Probabilities [B, H, queries, S] of full attention."""
        scores = (query.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].mT * scale).flatten(1, 2)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        hidden = torch.arange(keys.shape[2], device=keys.device) > position[:, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)


class _LessonCache(LongCache):
    """Not a cache: it sees every layer's queries and keys on their way."""

    def __init__(self, model: nn.Module, lesson: Lesson) -> None:
        super().__init__(layers=routed_layers(model, "train_bookmarks", lambda index: _LessonLayer(index, lesson)))


class _LessonLayer(AttendingLayer):
    owner = "train_bookmarks"

    def __init__(self, layer: int, lesson: Lesson) -> None:
        super().__init__()
        self.layer, self.lesson = layer, lesson

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        self._begin(call)
        if is_dense(call.spec):
            self.lesson.learn(self.layer, call)
        return attend(call)
