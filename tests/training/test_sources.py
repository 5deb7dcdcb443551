"""Files, folders and data sets on the Hub as streams of records, and what is told about bad ones."""

import sys
from types import SimpleNamespace

import pytest
from data_cases import TEXTS, TOKENIZER, jsonl

from lcpatch.training import encode, tokens
from lcpatch.training.sources import Source, sources


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": TEXTS}), tmp_path / "x.parquet")
    found = list(Source(str(tmp_path / "x.parquet")).records())
    assert found == [{"body": text} for text in TEXTS]
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"bad.parquet is no Parquet file"):
        list(Source(str(tmp_path / "bad.parquet")).records())


def test_a_data_set_on_the_hub_is_read_at_one_commit(monkeypatch):
    """What is streamed is the commit that the cache's key names."""
    asked = []

    def load_dataset(name, **settings):
        asked.append((name, settings))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: SimpleNamespace(sha=f"{name}-1"))
    source = Source("hub:me/data@validation")
    assert [record["text"] for record in source.records()] == ["one", "two"]
    assert asked == [("me/data", {"split": "validation", "streaming": True, "revision": "me/data-1"})]
    assert source.key() == "hub:me/data@validation@me/data-1"


def test_readers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"x.parquet is read with pyarrow: pip install 'lcpatch\[data\]'"):
        list(Source(str(tmp_path / "x.parquet")).records())
    with pytest.raises(ImportError, match=r"hub:me/data@train is loaded with `datasets`: pip install"):
        list(Source("hub:me/data@train").records())


def test_folders_hold_many_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("two")
    (tmp_path / "a" / "a.md").write_text("one")
    (tmp_path / "a" / "c.png").write_bytes(b"x")
    jsonl(tmp_path / "a" / "d.jsonl", [{"text": "three"}])
    found = [record["text"] for source in sources([str(tmp_path / "a")]) for record in source.records()]
    assert found == ["one", "two", "three"]
    assert len(list(sources([])[0].records())) == 1  # Python's manual


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty; name a file with records"),
        ('{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("[1]\n", "line 1 is list, not an object"),
        ('{"a": ' + "[" * 10**5, "line 1 is not JSON"),
        ('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}', r"line 2 has half a character in it \('.ud83d'\)"),
        ('{"body": "a"}\n', "a record has no text in 'text'; its fields: body. Name the right one with --text-field"),
        (
            '{"text": "a"}\n{"text": 3}\n',
            "x.jsonl, record 2: a record has text=3, which is not text; mend it, or name another --text-field",
        ),
        ('{"text": "a"}\n{"text": "\udcff"}\n', "x.jsonl line 2 is not UTF-8 text; convert the file"),
    ],
)
def test_broken_records(tmp_path, content: str, says: str):
    (tmp_path / "x.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=says):
        tokens.build(sources([str(tmp_path / "x.jsonl")]), encode.texts(TOKENIZER), tmp_path / "cache")


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(Source(str(tmp_path / "x.jsonl")).records()) == [{"text": "a"}, {"text": "b"}]


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing is no file or folder; a data set on the Hub is written hub:"):
        sources(["nothing"])
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=r"x.json: records are read from .jsonl, one JSON object a line, or .parquet"):
        sources([str(tmp_path / "x.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no .txt, .md, .rst, .jsonl, .parquet file in it"):
        sources([str(tmp_path / "empty")])
