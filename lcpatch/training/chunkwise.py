"""SeCO: the gradient of a long sequence, exactly, with one chunk's activations in memory at a time.

The first pass runs the chunks in order without gradients and keeps their keys and values; but for the last chunk, which
none reads. The second runs them again in reverse: a chunk's graph ends at the keys and values of the chunks before it,
whose gradient is kept; when their turn comes it enters as the gradient of their own keys and values. Every path of the
full graph is walked once, so `.grad` is what `loss.backward()` leaves, for not quite one more forward than it takes.
Where no one reads what comes out of the last layer's attention, in the first pass and in chunks without a label, it is
not run, if it is ours.

Source: SeCO and SpaCO, arXiv 2505.16710. Departures: any decoder of transformers, unmodified; keys, values and
gradients in place (buffers.py); labels shifted before the chunks are cut; what follows the last label is not run;
dropout is replayed; SpaCO without its bias (spaco.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import ParallelError
from ..hf.attention import SHARD
from ..hf.head import decode, decoder_of, head_of, trained_by
from ..hf.models import uncompiled
from . import spaco
from .buffers import DeviceStore, exact_gradients
from .chunk_cache import ChunkCache, KeysReadElsewhere
from .loss import IGNORE, summed_cross_entropy
from .offload import POOL, HostStore
from .packing import chunk_mask
from .parallel.chunks import share
from .support import Checkpointed, RandomState, check_model, eager, is_patched, ranks_of, routed, without_wrapper
from .text import Text, check_kwargs, make_text

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def backward(
    model: nn.Module,
    *,
    input_ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    grad_scale: float | Tensor = 1.0,
    estimator: str | Callable[[int], spaco.Plan] = "seco",
    keep: float | Sequence[float] = 1.0,
    generator: torch.Generator | None = None,
    offload: bool = False,
    attention: str = "auto",
    **model_kwargs: Any,
) -> Tensor:
    """Add to `.grad` what `model(input_ids, labels=labels, use_cache=False).loss.backward()` would, chunk by chunk.

    For a decoder of transformers, a PEFT model around one, patched by `lcpatch.apply` or not, also inside
    DistributedDataParallel (gradients are averaged once, in the last chunk). With dropout the masks are others than a
    plain forward's, but the same in both passes. Gradient checkpointing applies inside a chunk.

    A model that ranks share (`parallel.parallelize`) is given the whole batch on every one of them, and each runs its
    part of every chunk; what comes back is the rank's part of the loss (`ranks.total` adds them up), and gradients are
    to be summed as after any backward there (`ranks.sum_gradients`, or DistributedDataParallel's mean).

    Args:
        model: in the mode it is to train in.
        input_ids: [B, T].
        labels: [B, T], as transformers takes them: not shifted, -100 counts for nothing.
        chunk_size: tokens a chunk, over all ranks that share the model; the last may be shorter. Memory grows with it;
            2,048 or more a rank keep a GPU busy.
        attention_mask: [B, T], 1 = token and 0 = pad (left or right).
        position_ids: [1 or B, T]; restarts mark packed documents.
        num_items_in_batch: divides the summed loss, as transformers' Trainer passes it; default: the valid labels.
        grad_scale: factor of every gradient, not of the returned loss: a GradScaler's scale, 1 / accumulation steps.
        estimator: "seco"; SpaCO by "bernoulli" or "paper"; or a function of the number of chunks that returns a
            `spaco.Plan`. Under SpaCO the returned loss is that estimate too.
        keep: what SpaCO keeps of the chunks (see `spaco.draw`).
        generator: CPU generator of SpaCO's draw.
        offload: keep keys, values and their gradients in pinned host memory (see `offload`), for layers whose attention
            is ours; "auto" then means "lcpatch". The memory is kept for the next call.
        attention: "own": the model's attention as it is. "lcpatch": full-attention layers without a pattern run through
            `lcpatch_kernels.block_sparse`, which needs no mask of a chunk against its prefix and repeats no KV head.
            "auto": the latter on CUDA where it computes the same, else the former. "cudnn": as "lcpatch", but dense
            attention of whole rows through torch's cuDNN attention, in parts that are merged.
        **model_kwargs: passed on to the model as they are; none may hold something per token.

    Returns:
        The loss, 0-dim and detached.

    Raises:
        ValueError: inputs that do not fit, or without a label.
        UnsupportedModelError: a model for which this would not be exact; the message says why.
        ParallelError: of ranks that share the model: a text that they cannot share.
    """
    if offload and attention == "own":
        raise ValueError(
            "offload=True needs attention='lcpatch', 'cudnn' or 'auto': the model's own reads all keys at once"
        )
    isolates = is_patched(without_wrapper(model))
    text = make_text(input_ids, labels, attention_mask, position_ids, num_items_in_batch, chunk_size, isolates)
    kwargs = check_kwargs(model_kwargs, input_ids.shape[1], position_ids)
    text = _part_of(text, model, chunk_size, attention, offload)
    chunks = text.chunks(chunk_size)
    base = check_model(model, text, len(chunks))
    plan = estimator(len(chunks)) if callable(estimator) else spaco.draw(estimator, len(chunks), keep, generator)
    if len(plan.kept) != len(chunks):
        raise ValueError(f"the plan speaks of {len(plan.kept)} chunks, but the text has {len(chunks)}")
    if text.shards and estimator != "seco":
        plan = ranks_of(model).pool({"plan": plan})[0]["plan"]  # ranks that drew differently would wait for each other

    def passes(attention: str) -> Tensor:
        with _running(model, base, text, chunk_size, attention, offload, kwargs) as run:
            last = max((n for n, kept in enumerate(plan.kept) if kept), default=0)
            states = {n: run.record(*chunks[n]) for n in range(last)}
            return run.replay(chunks, states, plan, grad_scale)

    return _by_ours_or_its_own(passes, attention, offload)


def rehearse(
    model: nn.Module,
    *,
    length: int,
    chunk_size: int,
    batch: int = 1,
    offload: bool = False,
    attention: str = "auto",
    **model_kwargs: Any,
) -> None:
    """Run the first chunk of a text of `length` tokens, then the last two as `backward` does.

    There memory is at its peak: the last leaves gradients for all tokens before it, beside which the graph of the one
    before it is built. So a text that is too long fails in seconds, with the device's out-of-memory error, and not
    after an hour. What lies between is only allocated; offloaded, not even that, and host memory is not tried. The
    model's `.grad` is left as it was found.

    Args:
        model, chunk_size, offload, attention, **model_kwargs: as for `backward`.
        length, batch: of the text; all of it has labels.
    """
    before = {p: p.grad for p in model.parameters()}
    text, chunks, base = _blank(model, length, batch, chunk_size, attention, offload)
    count = len(chunks)
    two = range(max(count - 2, 0), count)
    plan = spaco.Plan(tuple(n in two for n in range(count)), (1.0,) * count, (1.0,) * count)

    def passes(attention: str) -> None:
        with _running(model, base, text, chunk_size, attention, offload, model_kwargs) as run:
            states = {}
            for n in sorted({0, *two} - {count - 1}):
                states[n] = run.record(*chunks[n])
                if n == 0 and count > 3:
                    run.cache.store.skip(count - 3)
            run.replay(chunks, states, plan, 1.0)

    try:
        for p in before:
            p.grad = None
        _by_ours_or_its_own(passes, attention, offload)
    finally:
        for p, grad in before.items():
            p.grad = grad


def first_pass(
    model: nn.Module,
    *,
    length: int,
    chunk_size: int,
    batch: int = 1,
    offload: bool = False,
    attention: str = "auto",
    **model_kwargs: Any,
) -> None:
    """Run what SeCO runs of a text before its first gradient: every chunk but the last, keeping keys and values.

    For measurements: the rest of `backward`'s time is one forward and backward of every chunk.

    Args:
        model, length, chunk_size, batch, offload, attention, **model_kwargs: as for `rehearse`.
    """
    text, chunks, base = _blank(model, length, batch, chunk_size, attention, offload)

    def record(attention: str) -> None:
        with _running(model, base, text, chunk_size, attention, offload, model_kwargs) as run:
            for chunk in chunks[:-1]:
                run.record(*chunk)

    _by_ours_or_its_own(record, attention, offload)


def _blank(
    model: nn.Module, length: int, batch: int, chunk_size: int, attention: str, offload: bool
) -> tuple[Text, list[tuple[int, int]], Any]:
    """A text of which only the size matters, its chunks, and the model that runs them, checked as by `backward`."""
    ids = torch.zeros(batch, length + 1, dtype=torch.long, device=next(model.parameters()).device)
    text = make_text(ids, ids, None, None, None, chunk_size, False)
    text = _part_of(text, model, chunk_size, attention, offload)
    chunks = text.chunks(chunk_size)
    return text, chunks, check_model(model, text, len(chunks))


def _by_ours_or_its_own(passes: Callable[[str], Result], attention: str, offload: bool) -> Result:
    """Both passes by our attention if that is asked for; by the model's own if that was left open and ours cannot.

    A layer that ours cannot serve says so in the first forward of a chunk, before there is any gradient.
    """
    try:
        return passes(attention)
    except KeysReadElsewhere as reason:
        if attention != "auto" or offload:
            raise
        logger.info("chunkwise: attention stays the model's own: %s", reason)
    return passes("own")


@contextmanager
def _running(
    model: nn.Module, base: Any, text: Text, chunk_size: int, attention: str, offload: bool, kwargs: dict[str, Any]
) -> Iterator[_Run]:
    """A model made ready for both passes over a text, and afterwards as it was."""
    attention = "lcpatch" if offload and attention == "auto" else attention
    shared = bool(text.shards)
    ours = nullcontext(frozenset()) if shared else routed(without_wrapper(model), base, attention, text)
    with eager(model), ours as attending:
        length = text.ids.shape[1]
        store = HostStore(length, chunk_size, attending, POOL) if offload else DeviceStore(length)
        plain, pieces = text.mask is None and text.documents is None, attention == "cudnn"
        num_layers = base.config.num_hidden_layers
        cache = ChunkCache(num_layers, store, attending, size=chunk_size, plain=plain, pieces=pieces, casts=shared)
        try:
            yield _Run(model, base, text, cache, kwargs)
        finally:
            store.close()


def _part_of(text: Text, model: nn.Module, chunk_size: int, attention: str, offload: bool) -> Text:
    """What of the text this process runs: all of it, or its part where ranks share the model."""
    ranks = ranks_of(model)
    if ranks is None:
        return text
    if offload or attention != "auto":
        what = "offload=True" if offload else f"attention={attention!r}"
        raise ParallelError(f"{what} is not for a model that ranks share: their strategy attends, on the device")
    return share(text, ranks, chunk_size)


class _Run:
    """The two passes over one text."""

    def __init__(self, model: nn.Module, base: Any, text: Text, cache: ChunkCache, kwargs: dict[str, Any]) -> None:
        self.model = uncompiled(model)
        self.base, self.text, self.cache, self.kwargs = base, text, cache, kwargs
        self.inner = without_wrapper(model)
        self.decoder = decoder_of(base)
        self.checkpointed = Checkpointed(base)
        self.devices = list({p.device for p in base.parameters()})
        self.behind: list[Tensor] | None = None

    def record(self, start: int, end: int) -> RandomState:
        """The first pass over tokens [start, end); returns where its random numbers began."""
        state = RandomState(self.devices)
        self.cache.set(start, end, new=True, read=False)
        with torch.no_grad(), self.checkpointed.chunk(recording=True):
            self._decode(self.inner, start, end)
        return state

    def replay(
        self, chunks: list[tuple[int, int]], states: dict[int, RandomState], plan: spaco.Plan, scale: float | Tensor
    ) -> Tensor:
        """The second pass, of which the first chunk to be run may be new; returns the loss."""
        after = RandomState(self.devices)
        order = [n for n in reversed(range(len(chunks))) if plan.kept[n]]
        loss_scales = dict(enumerate(plan.loss))
        replicas = self.model if isinstance(self.model, DistributedDataParallel) else None
        if not order and replicas is not None:  # the other processes wait for this one's gradients
            order, loss_scales = [0], {0: 0.0}
        total = torch.zeros((), device=self.text.ids.device)
        labelled = (self.text.targets != IGNORE).any(0).cpu()  # of all chunks at once: the host waits for the device
        for n in order:
            if n in states:
                states[n].restore()
            read = bool(labelled[slice(*chunks[n])].any())
            self.cache.set(*chunks[n], new=n not in states, read=read, hop=plan.hop[n])
            alone = replicas is not None and n != order[-1]
            with replicas.no_sync() if alone else nullcontext(), self.checkpointed.chunk(recording=False):
                loss = self._loss(*chunks[n]) * loss_scales[n] / self.text.denominator
                if n not in states:
                    after = RandomState(self.devices)
                self.cache.now.backward = True
                with exact_gradients(loss.device.type):
                    (loss * scale).backward()
            total = total + loss.detach()
        after.restore()
        return total

    def _loss(self, start: int, end: int) -> Tensor:
        """The summed loss of a chunk's rows, part of the chunk's graph also where it has no label."""
        output, hidden = self._decode(self.model, start, end)
        targets = self.text.targets[:, start:end]
        with head_of(self.inner, self.decoder, output, self.text.ids[:1, :1]) as head:
            self.behind = trained_by(head, hidden) if self.behind is None else self.behind
            return summed_cross_entropy(head, hidden, targets, self.behind, self.base.config.vocab_size)

    def _decode(self, model: nn.Module, start: int, end: int) -> tuple[Any, Tensor]:
        """What the decoder returns for a chunk, and its hidden states [B, C, H]."""
        if torch.is_autocast_enabled(self.text.ids.device.type):
            torch.clear_autocast_cache()  # weights that were cast without gradients would be taken for constants
        inputs = {"input_ids": self.text.ids[:, start:end], **self._where(start, end), **self.kwargs}
        result = decode(model, self.decoder, past_key_values=self.cache, use_cache=False, **inputs)
        self.cache.check()
        return result

    def _where(self, start: int, end: int) -> dict[str, Any]:
        """A chunk's positions, and the mask that says what it may see."""
        text, mask = self.text, None
        if text.documents is not None:
            mask = chunk_mask(self.decoder, text.documents, start, end, next(self.base.parameters()).dtype)
        elif text.mask is not None:
            mask = text.mask[:, :end]
        positions = None if text.positions is None else text.positions[:, start:end]
        told = {SHARD: text.shards[start, end]} if text.shards else {}
        return {"attention_mask": mask, "position_ids": positions, **told}
