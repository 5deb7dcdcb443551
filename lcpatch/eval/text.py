"""The text that tasks are built from, tokenized once: a stream to score, a haystack to hide things in."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.text import read_texts
from ..training.sources import HUB, Source

__all__ = ["Text", "read_documents"]

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
SENTENCE_END = (".", "!", "?", "\n")


TABLES = (".jsonl", ".parquet")
RECORDS = 256
"""Records that are read of a table or a data set on the Hub, unless more are asked for."""


def read_documents(
    names: Sequence[str | Path] | None, field: str = "text", records: int = RECORDS
) -> tuple[list[str], str]:
    """The documents that `names` mean, and what to call them.

    Args:
        names: text files and folders of them, tables (.jsonl, .parquet), and data sets on the Hub as `hub:NAME@SPLIT`;
            none: Python's own documentation, which every machine has.
        field: of a table's records: the one that holds the text.
        records: read so many of each table at most, from its beginning.

    Raises:
        FileNotFoundError, ValueError, ImportError: what cannot be read; the message says what to do.
    """
    if not names:
        return read_texts(None)
    documents: list[str] = []
    for name in map(str, names):
        if not (name.startswith(HUB) or name.endswith(TABLES)):
            documents += read_texts([name])[0]
            continue
        found = list(islice(Source(name).records(), records))
        missing = next((record for record in found if not isinstance(record.get(field), str)), None)
        if missing is not None:
            raise ValueError(f"{name} has a record without text in {field!r}; its fields are: {', '.join(missing)}")
        documents += [record[field] for record in found]
    return documents, ", ".join(str(n) if str(n).startswith(HUB) else Path(n).name for n in names)


class Text:
    """Documents as tokens of one tokenizer.

    Args:
        tokenizer: of the model that is measured.
        documents: what to read; they are joined by the end-of-text token, or by a blank line if there is none.
        name: what to call them in messages and reports.
        chat: put a context and its question into the tokenizer's chat template, as one message of the user.

    Raises:
        ValueError: `chat` without a template.
    """

    def __init__(self, tokenizer: Any, documents: Sequence[str], name: str, chat: bool = False) -> None:
        self.tokenizer, self.documents, self.name = tokenizer, list(documents), name
        self.before, self.after = self._template() if chat else ("", "")
        empty = [] if chat else list(tokenizer("").input_ids)  # a template writes its own
        eos = getattr(tokenizer, "eos_token_id", None)
        self.prefix: list[int] = [token for token in empty if token != eos or token == tokenizer.bos_token_id]
        self.gap = "" if chat else " "  # between a question and its answer
        self.opening = self.prefix + (self.encode(self.before) if chat else [])

    def _template(self) -> tuple[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template; leave --chat out, or use an instruction-tuned model")
        message = [{"role": "user", "content": MARK}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(MARK)
        return before, after

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of many pieces, in one call."""
        if not texts:
            return []
        return list(map(list, self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some tokens, as it is."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def stream(self) -> Tensor:
        """Every document's tokens, one after another, int64 [N]."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        joint = self.encode("\n\n") if eos is None else [eos]
        ids: list[int] = []
        for document in self.documents:
            ids += (joint if ids else []) + self.encode(document)
        return torch.tensor(ids, dtype=torch.long)

    @cached_property
    def fingerprint(self) -> str:
        """Tells two texts, or two tokenizers, apart."""
        return hashlib.sha256(self.stream.numpy().tobytes()).hexdigest()[:16]

    def need(self, count: int) -> None:
        """Refuse a text that is too short.

        Raises:
            ValueError: fewer than `count` tokens.
        """
        if len(self.stream) < count:
            raise ValueError(
                f"{self.name} has {len(self.stream)} tokens, but {count} are needed: give more text with --text, or "
                "shorter --lengths"
            )

    def haystack(self, rng: random.Random, count: int) -> list[int]:
        """`count` tokens in a row from somewhere in the text, beginning with a sentence if one begins near."""
        self.need(count)
        start = rng.randrange(len(self.stream) - count + 1)
        start = min(self.sentence_end(self.stream, start), len(self.stream) - count)
        return self.stream[start : start + count].tolist()

    def sentence_end(self, ids: Sequence[int] | Tensor, at: int, reach: int = 80) -> int:
        """The first place from `at` on that follows a sentence's last token; `at` itself if none is within `reach`."""
        for place in range(max(at, 1), min(at + reach, len(ids))):
            if self.decode([int(ids[place - 1])]).rstrip(" ").endswith(SENTENCE_END):
                return place
        return at
