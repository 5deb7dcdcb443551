"""A model that has read a context once and is asked about it many times, through any cache.

Every question starts from the same state of the cache: a plain cache is cut back to the context's end, an evicting one,
which cannot take back what it dropped, is copied. So the context is compressed before any question is known, which is
the hard case for evicting caches and the one that several questions over one context need.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..caches.growing import DenseLayer, GrowingLayer
from ..caches.held import bytes_held
from ..patching.apply import unwrap
from .perplexity import token_nll

WIDE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""How much memory copies of a cache for several candidates at once may take."""


class Reader:
    """Args:
    model: in eval mode.
    make_cache: an empty cache; None: transformers' own.
    chunk: read a context this many tokens at a time; None: in one go.
    batch_size: candidates that go through the model together.
    """

    def __init__(
        self,
        model: nn.Module,
        make_cache: Callable[[], Any] | None = None,
        *,
        chunk: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model, self.chunk, self.batch_size = model, chunk, batch_size
        self._own = make_cache is not None
        self._make = make_cache or (lambda: DynamicCache(config=unwrap(model).config))
        self.device = next(model.parameters()).device
        self.cache: Any = None

    def read(self, context: Sequence[int]) -> None:
        """Forget what was read before, and read `context`."""
        self.cache = self._make()
        ids = torch.tensor(context, device=self.device)
        for part in ids.split(self.chunk or len(ids)):
            self._feed(self.cache, part[None])

    def held(self) -> int:
        """Bytes on the model's device in which what was read is kept."""
        return bytes_held(self.cache.layers)["device"]

    def tell(self, ids: Sequence[int]) -> None:
        """Read on: what follows is said after `ids` as well."""
        self._feed(self.cache, torch.tensor(ids, device=self.device)[None])

    def ask(
        self, question: Sequence[int], candidates: Sequence[Sequence[int]], new_tokens: int, stop: set[int]
    ) -> tuple[list[float], list[int]]:
        """What each of `candidates` costs after the question, in nats, and what the model itself writes greedily.

        Args:
            new_tokens: the most that it writes; 0: it writes nothing.
            stop: tokens that end what it writes.
        """
        with self._branch(self.cache) as cache:
            logits = self._feed(cache, torch.tensor(question, device=self.device)[None])
            return self._rank(cache, logits, candidates), self._write(cache, logits, new_tokens, stop)

    def nll(self, windows: Tensor) -> Tensor:
        """`token_nll` of windows [N, T]: in one forward or, with a cache of lcpatch's, chunk after chunk through it."""
        return torch.cat([self._nll(part) for part in windows.to(self.device).split(self.batch_size)]).cpu()

    def _nll(self, ids: Tensor) -> Tensor:
        if not self._own and self.chunk is None:
            return token_nll(self.model, ids)
        cache, last = self._make(), ids.shape[1] - 1
        step = self.chunk or last
        parts = [
            token_nll(self.model, ids[:, start : min(start + step, last) + 1], past_key_values=cache)
            for start in range(0, last, step)
        ]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def _feed(self, cache: Any, ids: Tensor, keep: int = 1) -> Tensor:
        """The logits [B, keep, V] after `ids` [B, T]; keep = 0: of all of them."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits

    def _rank(self, cache: Any, logits: Tensor, candidates: Sequence[Sequence[int]]) -> list[float]:
        if not candidates:
            return []
        first = -logits[0, -1].float().log_softmax(-1)
        costs = [float(first[ids[0]]) for ids in candidates]
        longer = [n for n, ids in enumerate(candidates) if len(ids) > 1]
        for start in range(0, len(longer), wide := self._width(cache)):
            group = longer[start : start + wide]
            rows = [torch.tensor(candidates[n], device=self.device) for n in group]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            # Pads follow the tokens, so no token sees them; what they themselves are told is never read.
            with self._branch(cache, len(group)) as branch:
                nll = -self._feed(branch, ids[:, :-1].clamp(min=0), keep=0).float().log_softmax(-1)
            targets = ids[:, 1:, None]
            cost = nll.gather(-1, targets.clamp(min=0)).masked_fill(targets < 0, 0).sum((1, 2))
            for n, value in zip(group, cost.tolist(), strict=True):
                costs[n] += value
        return costs

    def _write(self, cache: Any, logits: Tensor, new_tokens: int, stop: set[int]) -> list[int]:
        written: list[int] = []
        while len(written) < new_tokens:
            token = logits[:, -1].argmax(-1)
            if int(token) in stop:
                break
            written.append(int(token))
            if len(written) < new_tokens:
                logits = self._feed(cache, token[:, None])
        return written

    def _width(self, cache: Any) -> int:
        """How many copies of `cache` there may be at one time."""
        room = WIDE_BYTES.get(self.device.type, WIDE_BYTES["cpu"])
        return max(1, min(self.batch_size, room // max(sum(bytes_held(cache.layers).values()), 1)))

    @contextmanager
    def _branch(self, cache: Any, repeat: int = 1) -> Iterator[Any]:
        """A cache in the state of `cache`, `repeat` rows of it; `cache` is as before afterwards."""
        if repeat > 1 or not all(type(layer) in (DynamicLayer, GrowingLayer, DenseLayer) for layer in cache.layers):
            branch = copy.deepcopy(cache)
            if repeat > 1:
                branch.batch_repeat_interleave(repeat)
            yield branch
            return
        before = cache.get_seq_length()
        try:
            yield cache
        finally:
            if (more := cache.get_seq_length() - before) > 0:
                cache.crop(-more)
