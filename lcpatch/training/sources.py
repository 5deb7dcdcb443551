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
RECORDS = (".jsonl", ".parquet")
SUFFIXES = (*TEXT, *RECORDS)
TABLES = (".json", ".csv", ".tsv")
"""Records that are not read, and would make a strange text."""
HUB = "hub:"

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set on the Hub.

    Args:
        name: the path, or `hub:NAME@SPLIT`; None: Python's own manual.
    """

    name: str | None

    @property
    def form(self) -> str:
        """How it is read: "hub", "jsonl", "parquet", or as one "text"."""
        if self.name is None:
            return "text"
        if self.name.startswith(HUB):
            return "hub"
        suffix = Path(self.name).suffix.lower()
        return suffix.removeprefix(".") if suffix in RECORDS else "text"

    def key(self) -> str:
        """Tells records apart: by what is read, and how. The same bytes are one text in .txt, and many in .jsonl."""
        if self.name is None:
            content = hashlib.sha256("".join(read_texts(None)[0]).encode()).hexdigest()
        elif self.form == "hub":
            repository, _, split = self.name.removeprefix(HUB).partition("@")
            content = f"{repository}@{split}@{_revision(repository)}"
        else:
            with Path(self.name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{self.form}:{content}"

    def records(self, text_field: str = "text") -> Iterator[Record]:
        """Its records, one after another.

        Raises:
            FileNotFoundError, ValueError: what cannot be read; the message names file and line.
            ImportError: a package that reads it is missing.
        """
        if self.name is None:
            yield from ({text_field: text} for text in read_texts(None)[0])
        elif self.form == "hub":
            yield from _from_hub(self.name)
        elif self.form == "jsonl":
            yield from _from_jsonl(Path(self.name))
        elif self.form == "parquet":
            yield from _from_parquet(Path(self.name))
        else:
            yield {text_field: read_text(Path(self.name))}


def sources(names: Sequence[str]) -> list[Source]:
    """The sources that `names` mean: files, every readable file below a folder, data sets on the Hub.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without data, or records in a form that is not read.
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
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not files:
                raise ValueError(f"{path} has no {', '.join(SUFFIXES)} file in it; name the files themselves")
            found += [Source(str(file)) for file in files]
        elif path.suffix.lower() in TABLES and path.is_file():
            raise ValueError(
                f"{path}: records are read from .jsonl, one JSON object a line, or .parquet; write them so, or name "
                "the file .txt to read it as one text"
            )
        elif path.is_file():
            found.append(Source(str(path)))
        else:
            raise FileNotFoundError(f"{name} is no file or folder; a data set on the Hub is written {HUB}{name}@train")
    return found


def _from_jsonl(path: Path) -> Iterator[Record]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 text; convert the file") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}; mend or delete that line") from error
            if b"\\ud" in line.lower():  # an escape of half a character, if its other half is missing
                try:
                    json.dumps(record, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"{path} line {number} has half a character in it ({error.object[error.start]!a}), which no "
                        "tokenizer takes; mend or delete that line"
                    ) from error
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
