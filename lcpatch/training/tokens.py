"""A corpus as tokens on disk: written once per content and tokenizer, a shard at a time, and mapped into memory.

A shard is one safetensors file that appears whole or not at all, so that a run that is killed goes on behind the last
one. Shards are cut by records, or pieces of long ones, and characters, which are known before anything is tokenized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..core.disk import replacing, why_unwritten
from ..core.errors import TrainingError
from ..core.program import sentence
from .sources import Record, Source

FORMAT = 3
"""Of what is on disk, and of how records become tokens: another one tokenizes anew."""
SHARD_RECORDS = 4096
SHARD_CHARACTERS = 8 << 20


@dataclass(frozen=True)
class Document:
    """One document's tokens; `learn` says which of them are predicted (None: all).

    It goes on in the next one, also in the next shard, unless it `ends`.
    """

    tokens: Sequence[int]
    learn: Sequence[bool] | None = None
    ends: bool = True


class Encoder:
    """Makes documents of records.

    Args:
        encode: a list of what records were split into -> for each a document, or None to leave it out.
        key: tells two encoders apart that give different tokens.
        split: a record -> what of it is encoded at a time. ValueError: a record that cannot be encoded.
    """

    def __init__(
        self,
        encode: Callable[[list[Record]], list[Document | None]],
        key: str,
        split: Callable[[Record], Iterable[Record]],
    ) -> None:
        self.encode, self.key, self.split = encode, key, split


class TokenStore:
    """The tokens of some sources, memory-mapped.

    Args:
        folder: a finished one, as `build` leaves it.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        self.index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files = [safe_open(folder / name, framework="np") for name in self.index["shards"]]
        self._tokens = [file.get_slice("tokens") for file in self._files]
        sizes = [part.get_shape()[0] for part in self._tokens]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        ends = [f.get_tensor("ends") + start for f, start in zip(self._files, self._starts, strict=False)]
        self.ends: np.ndarray = np.concatenate([np.zeros(0, np.int64), *ends])
        """Where each document ends, int64 [documents]."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]."""
        return self._read("tokens", start, stop)

    def learn(self, start: int, stop: int) -> np.ndarray:
        """Which of those tokens are predicted, bool."""
        if not self.index["masked"]:
            return np.ones(stop - start, bool)
        return self._read("learn", start, stop).astype(bool)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = []
        for shard in range(first, last + 1):
            offset = self._starts[shard]
            a, b = max(start - offset, 0), min(stop, self._starts[shard + 1]) - offset
            parts.append(self._files[shard].get_slice(name)[int(a) : int(b)])
        return np.concatenate(parts)


def build(
    sources: Sequence[Source],
    encoder: Encoder,
    cache: Path,
    *,
    text_field: str = "text",
    progress: bool | None = None,
) -> TokenStore:
    """The tokens of `sources`, from `cache` as far as they are there.

    Args:
        sources: what to read, in order.
        encoder: what makes tokens of records.
        cache: folder of all caches; this one gets a subfolder by its key.
        text_field: the field of a text file's record.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError: a source that is empty or broken.
        TrainingError: a full disk; what was finished stays. Or files of the cache are damaged.
    """
    parts = [FORMAT, encoder.key, [source.key() for source in sources]]
    folder = cache / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    if not (folder / "index.json").is_file():
        _write(sources, encoder, folder, text_field, progress)
    with _reading(folder):
        return TokenStore(folder)


def fingerprint(tokenizer: Any) -> str:
    """Tells tokenizers apart: vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256((content + json.dumps(rest)).encode()).hexdigest()


def _write(sources: Sequence[Source], encoder: Encoder, folder: Path, text_field: str, progress: bool | None) -> None:
    records = _split(sources, encoder, text_field)
    index: dict[str, Any] = {"shards": [], "records": 0, "left_out": 0, "masked": False}
    with tqdm(desc="tokenizing", unit="record", disable=None if progress is None else not progress) as bar:
        for number, batch in enumerate(_batches(records)):
            file = folder / f"{number:05d}.safetensors"
            if not file.is_file():
                _write_shard(file, encoder.encode(batch))
            with _reading(folder), safe_open(file, framework="np") as shard:
                facts = shard.metadata()
            index["shards"].append(file.name)
            index["records"] += len(batch)
            index["left_out"] += int(facts["left_out"])
            index["masked"] |= facts["masked"] == "yes"
            bar.update(len(batch))
    _atomically(folder / "index.json", lambda path: path.write_text(json.dumps(index), encoding="utf-8"))


def _split(sources: Sequence[Source], encoder: Encoder, text_field: str) -> Iterator[Record]:
    for source in sources:
        for number, record in enumerate(source.records(text_field), 1):
            try:
                pieces = list(encoder.split(record))
            except ValueError as error:
                raise ValueError(f"{source.name}, record {number}: {error}") from error
            yield from pieces


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _characters(record)
        if len(batch) == SHARD_RECORDS or size >= SHARD_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    """Of a record, or of what is inside it: a conversation's are those of its messages."""
    if isinstance(value, str):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inside))


def _write_shard(file: Path, documents: list[Document | None]) -> None:
    kept = [document for document in documents if document is not None and len(document.tokens)]
    masked = any(document.learn is not None for document in kept)
    arrays = {
        "tokens": np.concatenate([np.zeros(0, np.int32), *(np.asarray(d.tokens, np.int32) for d in kept)]),
        "ends": np.cumsum([len(d.tokens) for d in kept], dtype=np.int64)[np.array([d.ends for d in kept], bool)],
    }
    if masked:
        learn = (np.ones(len(d.tokens), bool) if d.learn is None else np.asarray(d.learn, bool) for d in kept)
        arrays["learn"] = np.concatenate(list(learn)).astype(np.uint8)
    facts = {"left_out": str(len(documents) - len(kept)), "masked": "yes" if masked else "no"}
    _atomically(file, lambda path: save_file(arrays, path, metadata=facts))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, FileNotFoundError) as error:
        raise TrainingError(
            f"{folder} is damaged ({sentence(error)}): delete that folder, and the data is tokenized again"
        ) from error


def _atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that another process, or one after a crash, finds a whole one or none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            write(partial)
    except Exception as error:
        reason = why_unwritten(error, file.parent)
        if reason is None:
            raise
        raise TrainingError(
            f"the tokens of the data could not be written ({reason}); what is finished stays. Make room, or name "
            "another folder in LCPATCH_CACHE, and run the same command to go on"
        ) from error
