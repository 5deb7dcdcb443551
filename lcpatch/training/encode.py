"""From records to tokens: running text for context extension, chats with their prompts masked for SFT."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from .sources import Record
from .tokens import Document, Encoder, fingerprint

PIECE = 1 << 20
"""Characters of a text that are tokenized at once: a tokenizer takes some 150 bytes of memory for each."""
NEAR = 200
"""Characters to either side of a cut that say whether it changes a token."""


def texts(tokenizer: Any, text_field: str = "text") -> Encoder:
    """Every record's text as a document, with what the tokenizer puts in front, and the end-of-text token behind it.

    A long text is tokenized in pieces, cut where that changes no token.
    """
    eos = tokenizer.eos_token_id

    def split(record: Record) -> Iterator[Record]:
        pieces = list(_cut(tokenizer, _text(record, text_field)))
        for number, piece in enumerate(pieces, 1):
            yield {"text": piece, "starts": number == 1, "ends": number == len(pieces)}

    def encode(pieces: list[Record]) -> list[Document | None]:
        found: dict[int, list[int]] = {}
        for starts in (True, False):
            those = [number for number, piece in enumerate(pieces) if piece["starts"] is starts]
            words = [pieces[number]["text"] for number in those]
            if words:
                encoded = tokenizer(words, add_special_tokens=starts, verbose=False).input_ids
                found |= dict(zip(those, encoded, strict=True))
        return [_document(piece, found[number], eos) for number, piece in enumerate(pieces)]

    return Encoder(encode, f"text/{text_field}/{fingerprint(tokenizer)}", split)


def _document(piece: Record, ids: list[int], eos: int | None) -> Document | None:
    whole = piece["starts"] and piece["ends"]
    if whole and not piece["text"].strip():
        return None
    has_eos = bool(ids) and ids[-1] == eos
    if not piece["ends"]:
        return Document(ids[:-1] if has_eos else ids, ends=False)
    return Document(ids if has_eos or eos is None else [*ids, eos])


def _cut(tokenizer: Any, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end, following = _place(tokenizer, text, start + PIECE)
        yield text[start:end]
        start = following
    yield text[start:]


def _place(tokenizer: Any, text: str, limit: int) -> tuple[int, int]:
    """Where before `limit` a piece can end, and where the next one begins, so that their tokens are those of both.

    Some tokenizers put a space in front of whatever they are given: for them the next piece begins behind one. Where a
    cut changes a token wherever it is made, one token is changed.
    """

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False, verbose=False).input_ids

    for end in range(limit, limit - NEAR, -1):
        before, after = text[end - NEAR : end], text[end : end + NEAR]
        both = ids(before + after)
        for skipped in (0, 1) if after[:1] == " " else (0,):
            if ids(before) + ids(after[skipped:]) == both:
                return end, end + skipped
    return limit, limit


def chats(tokenizer: Any, length: int) -> Encoder:
    """Every record's conversation through the chat template; only what the assistant says is predicted.

    A record has `messages` and perhaps `tools`, of which an assistant's may call some instead of saying anything; or
    `prompt` and `completion`, which take no template, and start as texts do unless the prompt says that itself; or
    `instruction`, `output` and perhaps `input` (LongAlpaca's form), which become one message of the user and one of the
    assistant. Fields that are null count as left out. A conversation that is longer than `length` is left out: cut
    short, it would lose its answer. Where a template writes earlier turns otherwise once there is a later one (Qwen 3's
    drops what was thought), only the last answer is predicted, after what the model then reads.

    Raises:
        ValueError: (when records are encoded) another form, or a tokenizer without a template that can be used.
    """

    def split(record: Record) -> Iterator[Record]:
        yield _conversation(record)

    def encode(records: list[Record]) -> list[Document | None]:
        made: list[Document | None] = []
        start = _start(tokenizer)
        for record in records:
            tokens: list[int] = []
            learn: list[bool] = []
            for text, answer in _pieces(tokenizer, record):
                ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                if "prompt" in record and not answer and ids[: len(start)] != start:  # a template writes its own
                    ids = start + ids
                tokens += ids
                learn += [answer] * len(ids)
            made.append(Document(tokens, learn) if len(tokens) <= length and any(learn[1:]) else None)
        return made

    key = hashlib.sha256(fingerprint(tokenizer).encode()).hexdigest()
    return Encoder(encode, f"chats/{length}/{key}", split)


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    whole, alone = (tokenizer("a", add_special_tokens=added, verbose=False).input_ids for added in (True, False))
    return whole[: whole.index(alone[0])]


def _text(record: Record, field: str) -> str:
    value = record.get(field)
    if field in record and not isinstance(value, str):
        raise ValueError(
            f"a record has {field}={value!r:.60}, which is not text; mend it, or name another --text-field"
        )
    if field not in record:
        have = ", ".join(map(str, record)) or "none"
        raise ValueError(f"a record has no text in {field!r}; its fields: {have}. Name the right one with --text-field")
    return value


def _pieces(tokenizer: Any, record: Record) -> Iterator[tuple[str, bool]]:
    """The conversation in pieces, each with whether the assistant says it.

    Each piece is tokenized for itself, so that a prompt's tokens are those that inference will see.
    """
    if "prompt" in record:
        yield record["prompt"], False
        yield record["completion"] + (tokenizer.eos_token or ""), True
        return
    messages = record["messages"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template: take an instruction-tuned model's, or records with `prompt` and "
            "`completion`"
        )
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    found = [_turn(tokenizer, messages, n, record["tools"]) for n in answers]
    if not all(later.startswith(prompt + answer) for (prompt, answer), (later, _) in pairwise(found)):
        warnings.warn(
            "this chat template changes earlier turns when one is added (as where it drops what was thought): of such "
            "conversations only the last answer is learnt, after what it makes of the others then",
            stacklevel=2,
        )
        found = found[-1:]
    done = ""
    for prompt, answer in found:
        yield prompt[len(done) :], False
        yield answer, True
        done = prompt + answer


def _turn(tokenizer: Any, messages: list[Any], number: int, tools: list[Any] | None) -> tuple[str, str]:
    """What the assistant reads before message `number`, and what it says."""
    prompt = _render(tokenizer, messages[:number], tools, add_generation_prompt=True)
    whole = _render(tokenizer, messages[: number + 1], tools)
    if not whole.startswith(prompt):
        raise ValueError(
            "this chat template changes earlier turns when an answer is added to them, so that it cannot be told from "
            "its prompt; give records with `prompt` and `completion` instead"
        )
    return prompt, whole[len(prompt) :]


def _render(tokenizer: Any, messages: list[Mapping[str, Any]], tools: list[Any] | None, **kwargs: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages) or "no one before the assistant"
        raise ValueError(
            f"the tokenizer's chat template takes no conversation of {roles}: {error}; mend such records, or give them "
            "as `prompt` and `completion`"
        ) from error


def _conversation(record: Record) -> Record:
    """The record as `prompt` and `completion`, or as `messages`."""
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return {name: record[name] for name in ("prompt", "completion")}
    messages = record.get("messages")
    if messages is None and isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        more = record.get("input")
        asked = record["instruction"] + (f"\n\n{more}" if more else "")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    tools = record.get("tools")
    if not isinstance(tools, (list, type(None))):
        raise ValueError(f"a record has tools={tools!r:.60}, which must be a list of their descriptions, or left out")
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or (m.get("content") is None and m.get("tool_calls")))
        for m in messages
    )
    if not good or not any(m["role"] == "assistant" for m in messages):
        raise ValueError(
            f"a record is no conversation with an answer; its fields: {', '.join(map(str, record)) or 'none'}. Wanted: "
            "`messages` (role and content, one of them the assistant's), `prompt` and `completion`, or `instruction`, "
            "`input` and `output`"
        )
    return {"messages": _without_nulls(messages), "tools": _without_nulls(tools) or None}


def _without_nulls(value: Any) -> Any:
    """`value` without fields that are null, at every depth: Arrow, and so Parquet, gives a record those of all others.

    A template would tell of them, as of parameters and arguments that no one named.
    """
    if isinstance(value, Mapping):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
