"""Where training data comes from: text, JSONL and Parquet files, folders of them, or a data set on the Hub.

Every source is a stream of records; of a text file the record is {"text": …}. A source also has a key that changes with
its content, so that what was tokenized once is found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.text import read_text, read_texts

TEXT = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT, ".jsonl", ".parquet")
HUB = "hub:"

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set on the Hub.

    Args:
        name: the path, or `hub:NAME@SPLIT`; None: Python's own manual.
    """

    name: str | None

    def key(self) -> str:
        """Tells contents apart."""
        if self.name is None:
            return hashlib.sha256("".join(read_texts(None)[0]).encode()).hexdigest()
        if self.name.startswith(HUB):
            repository, _, split = self.name.removeprefix(HUB).partition("@")
            return f"{repository}@{split}@{_revision(repository)}"
        digest = hashlib.sha256()
        with Path(self.name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def records(self, text_field: str = "text") -> Iterator[Record]:
        """Its records, one after another.

        Raises:
            FileNotFoundError, ValueError: what cannot be read; the message names file and line.
            ImportError: a package that reads it is missing.
        """
        if self.name is None:
            yield from ({text_field: text} for text in read_texts(None)[0])
        elif self.name.startswith(HUB):
            yield from _from_hub(self.name)
        elif self.name.endswith(".jsonl"):
            yield from _from_jsonl(Path(self.name))
        elif self.name.endswith(".parquet"):
            yield from _from_parquet(Path(self.name))
        else:
            yield {text_field: read_text(Path(self.name))}


def sources(names: Sequence[str]) -> list[Source]:
    """The sources that `names` mean: files, every readable file below a folder, data sets on the Hub.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without data.
    """
    if not names:
        return [Source(None)]
    found: list[Source] = []
    for name in names:
        if name.startswith(HUB):
            found.append(Source(name))
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not files:
                raise ValueError(f"{path} has no {', '.join(SUFFIXES)} file in it; name the files themselves")
            found += [Source(str(file)) for file in files]
        elif path.is_file():
            found.append(Source(str(path)))
        else:
            raise FileNotFoundError(f"{name} is no file or folder; a data set on the Hub is written {HUB}{name}@train")
    return found


def _from_jsonl(path: Path) -> Iterator[Record]:
    empty = True
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}; mend or delete that line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path} line {number} is {type(record).__name__}, not an object with fields")
            empty = False
            yield record
    if empty:
        raise ValueError(f"{path} is empty; name a file with records in it")


def _from_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f"{path} is read with pyarrow: pip install 'lcpatch[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    with file:
        if not file.metadata.num_rows:
            raise ValueError(f"{path} is empty; name a file with records in it")
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _from_hub(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} is loaded with `datasets`: pip install 'lcpatch[data]'") from error
    repository, _, split = name.removeprefix(HUB).partition("@")
    stream = datasets.load_dataset(repository, split=split or "train", streaming=True, revision=_revision(repository))
    yield from (dict(record) for record in stream)


def _revision(repository: str) -> str:
    """The commit that is read, so that a cache never mixes two versions."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository).sha
