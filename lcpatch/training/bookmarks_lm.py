"""Trains the page scorer "bookmark" on through the language-model loss: pages score high that help to say what follows.

Source: RetroLM, arXiv 2502.11444 (stage 2: language modelling on plain text over retrieved pages). Departures:

- The paper trains the model itself, so that it learns to live with what is retrieved. Here the model stays as it is, a
  cache must fit any model, and the loss moves the bookmarks alone.
- As in `RetrievalCache` the begin of a text is read in full, and each of its last tokens chooses pages for itself.
- A choice has no derivative, so it is straight-through (arXiv 1308.3432): forward, a page counts fully or not at all,
  just as the cache reads; backward, its weight is the sigmoid of how far its score is above the threshold, halfway
  between the worst page chosen and the best one left. Pages left out learn as well, by how reading them would have
  changed the attention's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..caches.cache import LongCache, routed_layers
from ..caches.layer import AttendingLayer
from ..caches.reads import Reads
from ..caches.scattered import is_dense
from ..caches.scorers import Bookmarks
from ..hf.watch import Call, attend
from .bookmarks import lent, placed


def tune_bookmarks(
    model: nn.Module,
    texts: Iterable[Tensor],
    bookmarks: Bookmarks,
    *,
    budget: int | float = 2048,
    page: int = 128,
    num_sinks: int = 4,
    recent: int = 128,
    num_queries: int = 64,
    lr: float = 1e-4,
    say: Callable[[int, float], None] | None = None,
) -> Bookmarks:
    """Train on one text after the other: one forward of the frozen model and one step of Adam for each.

    Args:
        model: a causal language model of transformers; its weights stay as they are, layers under a pattern left out.
        texts: token ids [B, T] without padding, longer than the budget.
        bookmarks: to go on with, those of `train_bookmarks` or of this.
        budget, page, num_sinks, recent: as in `RetrievalCache`.
        num_queries: tokens at a text's end that read pages, and whose loss is learnt from.
        lr: of Adam.
        say: called with the step and its loss.

    Returns:
        The bookmarks, for `RetrievalCache(model, scorer=bookmarks)`; `bookmarks.save(path)` writes them.

    Raises:
        UnsupportedModelError: a model whose attention cannot be exchanged, or without a full-attention layer.
        ValueError: options out of range, a text that the budget holds, a model whose layers all follow a pattern, or
            bookmarks of another shape than its heads.
    """
    reads = Reads(budget, page, num_sinks, recent)
    bookmarks = placed(bookmarks, model)
    optimiser = torch.optim.Adam(bookmarks.parameters(), lr)
    with lent(model):
        for step, ids in enumerate(texts):
            loss = reading_loss(model, ids, bookmarks, reads, num_queries)
            if not loss.requires_grad:
                raise ValueError("every layer follows a pattern, so none reads pages: lcpatch.remove(model) first")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if say is not None:
                say(step, loss.item())
    return bookmarks


@torch.no_grad()
def measure_reading(
    model: nn.Module,
    texts: Iterable[Tensor],
    bookmarks: Bookmarks,
    *,
    budget: int | float = 2048,
    page: int = 128,
    num_sinks: int = 4,
    recent: int = 128,
    num_queries: int = 64,
) -> float:
    """The loss of the last tokens of `texts`, as `tune_bookmarks` says it: that of tokens read by a retrieval cache."""
    reads = Reads(budget, page, num_sinks, recent)
    bookmarks = placed(copy.deepcopy(bookmarks), model)
    with lent(model):
        losses = [reading_loss(model, ids, bookmarks, reads, num_queries).item() for ids in texts]
    return sum(losses) / len(losses)


def reading_loss(model: nn.Module, ids: Tensor, bookmarks: Bookmarks, reads: Reads, num_queries: int) -> Tensor:
    """The mean cross-entropy of a text's last tokens [B, T], each of which reads its pages; the model is `lent`.

    Raises:
        ValueError: a text that the budget holds, or fewer than two tokens to learn from.
    """
    if num_queries < 2:
        raise ValueError(f"num_queries={num_queries} must be at least 2: a token says the one after it")
    begin = ids.shape[1] - num_queries
    if begin < reads.of(begin) * reads.page:
        raise ValueError(
            f"a text of {ids.shape[1]} tokens, the last {num_queries} of which read pages, leaves none out with "
            f"budget={reads.budget.tokens}: give at least {reads.of(begin) * reads.page + num_queries}, or a smaller "
            "budget"
        )
    ids = ids.to(bookmarks.query.device)
    cache = _ReadingCache(model, bookmarks, reads)
    with torch.no_grad():
        model(ids[:, :begin], past_key_values=cache, logits_to_keep=1)
    logits = model(ids[:, begin:], past_key_values=cache).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.to(_exact(logits)), ids[:, begin + 1 :].flatten())


class _ReadingCache(LongCache):
    """What is fed first is read in full and kept; what is fed then reads pages of it."""

    def __init__(self, model: nn.Module, bookmarks: Bookmarks, reads: Reads) -> None:
        def make(index: int) -> _ReadingLayer:
            return _ReadingLayer(index, bookmarks, reads)

        super().__init__(layers=routed_layers(model, "tune_bookmarks", make))


class _ReadingLayer(AttendingLayer):
    owner = "tune_bookmarks"

    def __init__(self, layer: int, bookmarks: Bookmarks, reads: Reads) -> None:
        super().__init__()
        self.layer, self.bookmarks, self.reads = layer, bookmarks, reads

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        key, value = self._begin(call)
        begin, self.seen = self.seen, self.seen + key.shape[2]
        if begin == 0:
            self.keys, self.values = key, value
            return attend(call)
        key, value = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        if not is_dense(call.spec):
            return attend(call._replace(key=key, value=value))
        most = self.reads.of(begin)
        # Scores and probabilities of every layer at once would be the largest tensors of a step.
        return checkpoint(self._read, call.query, key, value, most, call.scale, call.softcap, use_reentrant=False)

    def _read(
        self, query: Tensor, key: Tensor, value: Tensor, most: int, scale: float | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        dtype = _exact(query)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (x.to(dtype) for x in (query, key, value))
        chosen, soft = choose(self.bookmarks.scores(self.layer, q, k, self.reads.page) * scale, k, most, self.reads)
        scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * scale  # [B, K, G, Q, S]
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        token = torch.arange(k.shape[2], device=k.device)
        scores = scores.masked_fill(token > token[-q.shape[2] :, None], -torch.inf)
        of = token // self.reads.page  # every key's page
        top = scores.masked_fill(chosen[:, :, None, :, of] == 0, -torch.inf).amax(-1, keepdim=True).detach()
        p = (scores - top).clamp(max=60).exp()  # a key left out may lie far above those read
        p = p * relax(chosen[:, :, None], soft[:, :, None], _pages(p.detach(), self.reads.page))[..., of]
        total = p.sum(-1, keepdim=True)
        lse = (top + total.log())[..., 0]
        return (p @ v[:, :, None] / total).flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def choose(scores: Tensor, key: Tensor, most: int, reads: Reads) -> tuple[Tensor, Tensor]:
    """`(chosen, soft)` [B, K, Q, pages]: 1 for pages that a token reads and 0 for others, and how nearly each is read,
    which is differentiable in the scores; 0 for the pages that nothing can leave out.

    Args:
        scores: [B, H, Q, full pages] of the last Q tokens, in the units of attention's scores.
        key: [B, K, S, D] of all tokens.
        most: pages that each token reads, its own among them.
        reads: which of them always.
    """
    page, length = reads.page, key.shape[2]
    position = torch.arange(length - scores.shape[2], length, device=key.device)[:, None]
    pages = torch.arange(-(-length // page), device=key.device)
    always = (pages < reads.sink_pages) | (pages >= (position + 1 - reads.recent) // page)  # [Q, pages]
    left = most - (always & (pages <= position // page)).sum(-1, keepdim=True)  # to choose, one at least
    scores = F.pad(scores.unflatten(1, (key.shape[1], -1)).amax(2), (0, len(pages) - scores.shape[-1]))
    scores = scores.masked_fill(always, -torch.inf)
    best, order = scores.topk(int(left.max()) + 1, -1)
    threshold = torch.cat([best.gather(-1, (left + n).expand(*best.shape[:-1], 1)) for n in (-1, 0)], -1)
    within = (torch.arange(best.shape[-1], device=key.device) < left).to(scores)
    chosen = torch.zeros_like(scores).scatter(-1, order, within.expand_as(best))
    return chosen.masked_fill(always, 1), (scores - threshold.mean(-1, keepdim=True)).sigmoid()


def relax(chosen: Tensor, soft: Tensor, mass: Tensor) -> Tensor:
    """`chosen`, with the derivative of `soft` [B, K, 1, Q, pages], given what pages weigh [B, K, G, Q, pages].

    At weight 0 a page of mass m moves the output by (its own mean - output) m / M, where M is the mass of what is read:
    without bound. Reading it whole moves it by (its own mean - output) m / (M + m), and so does this.
    """
    read = (chosen * mass).sum(-1, keepdim=True)
    share = torch.where(chosen > 0, 1, read / (read + mass))
    return chosen + share * (soft - soft.detach())


def _pages(p: Tensor, page: int) -> Tensor:
    """Sums of p [..., S] over pages, the last of which may not be full."""
    return F.pad(p, (0, -p.shape[-1] % page)).unflatten(-1, (-1, page)).sum(-1)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
