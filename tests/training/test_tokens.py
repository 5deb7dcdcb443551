"""Tokens on disk: made once per content and tokenizer, also by a run that was killed."""

import os
from itertools import chain

import eval_cases
import numpy as np
import pytest
from data_cases import BOS, TEXTS, TOKENIZER, expected, jsonl, store, texts

from lcpatch.core.errors import TrainingError
from lcpatch.training import encode, tokens
from lcpatch.training.sources import sources


def test_documents_are_tokenized_once(tmp_path, monkeypatch):
    made = texts(tmp_path)
    want = expected()
    assert want[0][0] == BOS
    assert made.tokens(0, len(made)).tolist() == list(chain(*want))
    assert made.ends.tolist() == np.cumsum([len(ids) for ids in want]).tolist()
    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenized again"))
    again = texts(tmp_path)
    assert again.tokens(3, 9).tolist() == list(chain(*want))[3:9]


def test_the_cache_follows_content_and_tokenizer(tmp_path):
    folders = set()
    for words, tokenizer in [(TEXTS, TOKENIZER), (TEXTS[1:], TOKENIZER), (TEXTS, eval_cases.tokenizer())]:
        store(tmp_path, [{"text": text} for text in words], encode.texts(tokenizer))
        folders.add(len(list((tmp_path / "cache").iterdir())))
    assert folders == {1, 2, 3}


def test_the_cache_follows_how_a_file_is_read(tmp_path):
    """The same bytes are one text or many records, and records have more than one field."""
    records = [{"text": "One.", "body": "Two or three."}, {"text": "Three.", "body": "Four."}]
    for name in ("x.txt", "x.jsonl", "X.JSONL"):
        jsonl(tmp_path / name, records)

    def read(name: str, field: str = "text") -> list[int]:
        encoder = encode.texts(TOKENIZER, field)
        data = sources([str(tmp_path / name)])
        made = tokens.build(data, encoder, tmp_path / "cache", text_field=field, progress=False)
        return made.tokens(0, len(made)).tolist()

    whole = (tmp_path / "x.txt").read_text()
    assert read("x.txt") == list(chain(*expected([whole])))
    assert read("x.jsonl") == read("X.JSONL") == list(chain(*expected(["One.", "Three."])))
    assert read("x.jsonl", "body") == list(chain(*expected(["Two or three.", "Four."])))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_tokenization_goes_on(tmp_path, monkeypatch, stop: int):
    """Finished shards are kept, and no half one is ever seen; the result is that of one go."""
    monkeypatch.setattr(tokens, "SHARD_RECORDS", 1)
    calls = []
    save = tokens.save_file

    def fail_at(arrays, path, metadata):
        calls.append(path)
        if len(calls) == stop + 1:
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28), str(path))
        save(arrays, path, metadata=metadata)

    monkeypatch.setattr(tokens, "save_file", fail_at)
    with pytest.raises(TrainingError, match=r"could not be written \(No space left.* MiB are free in .*LCPATCH_CACHE"):
        texts(tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [f"{n:05d}.safetensors" for n in range(stop)]
    monkeypatch.setattr(tokens, "save_file", save)
    made = texts(tmp_path)
    assert len(made.index["shards"]) == len(TEXTS)
    flat = list(chain(*expected()))
    for start in range(0, len(flat), 5):
        for end in range(start + 1, len(flat) + 1, 7):
            assert made.tokens(start, end).tolist() == flat[start:end]


def test_a_cache_that_can_be_no_folder(tmp_path):
    (tmp_path / "cache").touch()
    says = rf"could not be written \(.*; .* MiB are free in {tmp_path}\).*or name another folder in LCPATCH_CACHE"
    with pytest.raises(TrainingError, match=says):
        texts(tmp_path)


@pytest.mark.parametrize("files", ["*.safetensors", "index.json"])
def test_a_damaged_cache_is_named(tmp_path, files: str):
    made = texts(tmp_path)
    folder = tmp_path / "cache" / made.key
    for file in folder.glob(files):
        file.write_bytes(b"")
    with pytest.raises(TrainingError, match=rf"{made.key} is damaged \(.*\): delete that folder, and the data is"):
        texts(tmp_path)
