"""Perplexity, as a measure and as a task. Memory is one chunk x vocabulary, whatever the length.

The text goes through the decoder once. Its hidden states then go, a chunk at a time, through whatever the model itself
puts behind them: the head, a logit scale (Cohere, Granite), a final softcap (Gemma); see `hf.head`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hf.head import decode, decoder_of, head_of
from ..patching.apply import unwrap
from .task import Task, Unit, tasks

if TYPE_CHECKING:
    from .reader import Reader
    from .text import Text

PROTOCOLS = ("longlora", "sliding")
STRIDE = 256
"""Tokens from one window of the `longlora` protocol to the next."""
TAIL = 1024
"""The last tokens of a window, which have the longest context: they are also reported for themselves."""
BINS = 64
CPU_ROWS = 64
"""Rows of logits whose loss a CPU computes at a time: 256 of 49,152 in one go take thrice as long, in page faults."""


@torch.no_grad()
def token_nll(
    model: nn.Module, input_ids: Tensor, *, attention_mask: Tensor | None = None, chunk_size: int = 512, **kwargs: Any
) -> Tensor:
    """What each next token costs: its negative log-likelihood in nats, given all before it.

    The model runs as it is, in its own mode: call `model.eval()` first if that is what you want to measure.

    Args:
        model: a causal language model, patched or not, or a PEFT model around one.
        input_ids: [B, T], T >= 2.
        attention_mask: [B, T], 1 = token and 0 = pad.
        chunk_size: tokens whose logits exist at one time.
        **kwargs: passed on to the model, such as `past_key_values` to keep the cache of the first T - 1 tokens, or
            `position_ids` [B or 1, T - 1].

    Returns:
        fp32 [B, T - 1]; NaN where a pad is predicted, or predicts.

    Raises:
        ValueError: fewer than two tokens, or a model without a language-model head.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids {list(input_ids.shape)} must be [batch, tokens] with at least two tokens")
    base = unwrap(model)
    if base.base_model is base:
        raise ValueError(f"{type(base).__name__} has no language-model head; load it with AutoModelForCausalLM")
    given, targets = input_ids[:, :-1], input_ids[:, 1:]
    mask = None if attention_mask is None else attention_mask[:, :-1]
    kwargs = {"use_cache": kwargs.get("past_key_values") is not None, **kwargs}
    decoder = decoder_of(base)
    output, hidden = decode(model, decoder, input_ids=given, attention_mask=mask, **kwargs)
    with head_of(model, decoder, output, given[:1, :1]) as head:
        parts = zip(hidden.split(chunk_size, 1), targets.split(chunk_size, 1), strict=True)
        nll = torch.cat([_cross_entropy(head(part), target) for part, target in parts], 1)
    if attention_mask is not None:
        real = attention_mask.bool()
        nll = nll.masked_fill(~(real[:, 1:] & real[:, :-1]), torch.nan)
    return nll


def perplexity(nll: Tensor) -> float:
    """exp of the mean of `token_nll`'s result; pads (NaN) do not count."""
    return float(nll.double().nanmean().exp())


@tasks.register("perplexity")
@dataclass(frozen=True)
class Perplexity(Task):
    """How well the next token of a text is predicted, in windows of the length that is measured.

    Source: LongLoRA's evaluation code, arXiv 2309.12307 (`longlora`: a window every 256 tokens over the joined text,
    one forward each from an empty cache, all positions averaged; perplexity = exp of the mean of the windows' losses),
    and the usual sliding window (`sliding`: a window every `last` tokens of which only the last `last` are scored).
    Departures: `max_windows` of them, evenly spread from the text's beginning on, instead of all; and a tokenizer that
    puts a token before every text (BOS) also puts it before every window, in place of the window's last token.

    Args:
        protocol: "longlora" or "sliding".
        last: tokens scored in a window of `sliding`.
        max_windows: 0: all.
    """

    title: ClassVar[str] = "perplexity of real text, in tokens and in bytes"
    source: ClassVar[str] = "2309.12307"
    only_plan: ClassVar[tuple[str, ...]] = ("max_windows",)
    scores_text: ClassVar[bool] = True

    protocol: str = "longlora"
    last: int = 256
    max_windows: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if self.last < 1 or self.max_windows < 0:
            raise ValueError(f"last={self.last} must be at least 1, and max_windows={self.max_windows} at least 0")

    def units(self, text: Text, length: int, seeds: Sequence[int]) -> Iterator[Unit]:
        """One a window; a text has no randomness, so seeds change nothing."""
        if self.protocol == "sliding" and self.last >= length:
            raise ValueError(f"last={self.last} must be less than the length, {length}")
        own = length - len(text.prefix)
        text.need(own)
        starts = range(0, len(text.stream) - own + 1, STRIDE if self.protocol == "longlora" else self.last)
        count = min(self.max_windows or len(starts), len(starts))
        for number in range(count):
            yield Unit(length, 0, {"start": starts[number * len(starts) // count]})

    def sample(self, text: Text, unit: Unit) -> Tensor:
        """The window, [1, length]."""
        start = unit.facts["start"]
        own = text.stream[start : start + unit.length - len(text.prefix)]
        return torch.cat([torch.tensor(text.prefix, dtype=torch.long), own])[None]

    def measure(self, text: Text, sample: Tensor, reader: Reader, score: str) -> dict[str, Any]:
        """Losses of the window: their mean, by position, and per byte."""
        nll = reader.nll(sample)[0].double()
        scored = nll[-self.last :] if self.protocol == "sliding" else nll
        size = len(text.decode(sample[0, -len(scored) :]).encode())
        edges = [round(n * len(nll) / BINS) for n in range(BINS + 1)] if len(nll) >= BINS else range(len(nll) + 1)
        bins = [[a, b, float(nll[a:b].mean())] for a, b in pairwise(edges)]
        row = {"nll": float(scored.mean()), "tokens": len(scored), "bytes": size, "positions": bins}
        row["bits_per_byte"] = float(scored.sum()) / math.log(2) / max(size, 1)
        return row | ({"tail_nll": float(nll[-TAIL:].mean())} if len(nll) > TAIL else {})


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # Rows of classes, not [B, V, n]: along a strided axis a CPU takes ten times as long.
    rows, classes = logits.flatten(0, 1), targets.flatten().to(logits.device)
    size = CPU_ROWS if rows.device.type == "cpu" else len(rows)
    pieces = zip(rows.split(size), classes.split(size), strict=True)
    return torch.cat([F.cross_entropy(part.float(), right, reduction="none") for part, right in pieces]).view(
        targets.shape
    )
