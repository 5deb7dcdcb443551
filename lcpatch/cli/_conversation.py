"""A conversation through one cache: every turn is read once, and the cache goes on where the last answer ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.decode_ahead import decode_ahead


@dataclass(frozen=True)
class Turn:
    """One answer: its text, its tokens, the seconds until the first of them and those of all that followed."""

    text: str
    tokens: int
    first_s: float
    rest_s: float


class Conversation:
    """Args:
    model, tokenizer: of one model; with a chat template turns are roles, without one lines of one text.
    make_cache: an empty cache.
    system: said before the first turn.
    chunk: read what is said this many tokens at a time, through a cache of lcpatch's; None: in one go.
    options: of `model.generate`.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, make_cache: Any, system: str | None, chunk: int | None, **options: Any
    ) -> None:
        self.model, self.tokenizer, self.make_cache = model, tokenizer, make_cache
        self.chunk, self.options = chunk, options
        self.messages = [{"role": "system", "content": system}] if system else []
        self.rendered = "" if tokenizer.chat_template else (system or "")
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=next(model.parameters()).device)
        self.cache = make_cache()

    def say(self, text: str, streamer: Any) -> Turn:
        """Answer `text`, writing to `streamer` as tokens come; Ctrl-C ends the answer, not the conversation."""
        self.ids = torch.cat([self.ids, self._heard(text)], 1)
        begin = time.perf_counter()
        if self.chunk and hasattr(self.cache, "read"):
            self.cache.read(self.ids, chunk=self.chunk)
        clock = _Clock(streamer)
        # Only a compiled step leaves the host time to be ahead; elsewhere an answer's end would cost a forward.
        ahead = {"custom_generate": decode_ahead, "stream_to": clock}
        with _ctrl_c() as pressed:
            out = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                past_key_values=self.cache,
                stopping_criteria=[pressed],
                **(ahead if self.cache.is_compileable else {"streamer": clock}),
                **self.options,
            )
        end = time.perf_counter()
        new = out[0, self.ids.shape[1] :]
        self.ids = out
        answer = self.tokenizer.decode(new, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        self.rendered += self.tokenizer.decode(new)
        first = clock.first or end
        return Turn(answer, len(new), first - begin, end - first)

    def _heard(self, text: str) -> Tensor:
        """The tokens that follow what is in the cache."""
        self.messages.append({"role": "user", "content": text})
        if self.tokenizer.chat_template is None:
            whole = self.rendered + ("\n" if self.rendered else "") + text + "\n"
        else:
            whole = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(self.rendered):  # the template rewrote earlier turns, so they are read anew
            self.ids, self.rendered, self.cache = self.ids[:, :0], "", self.make_cache()
        new, first = whole[len(self.rendered) :], not self.rendered
        self.rendered = whole
        special = first and self.tokenizer.chat_template is None
        ids = self.tokenizer(new, return_tensors="pt", add_special_tokens=special).input_ids
        return ids.to(self.ids.device)


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """A criterion that ends a text at its next token once Ctrl-C was pressed, which leaves a cache whole.

    Pressed again, as while a long prompt is read, it interrupts as always.
    """
    presses = 0

    def press(*_: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    def pressed(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((len(input_ids),), presses > 0, device=input_ids.device)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Clock:
    """Passes tokens on, and notes when the first new one came; `generate` hands over the prompt before."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.first, self.prompt = streamer, None, True

    def put(self, value: Tensor) -> None:
        if not self.prompt and self.first is None:
            self.first = time.perf_counter()
        self.prompt = False
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
