"""SinkLoRA's mixture by its proportions, from local fixtures, up to rows to train on."""

import copy
import importlib.util
import json
from collections import Counter
from pathlib import Path

import eval_cases
import pytest
from hypothesis import given
from hypothesis import strategies as st
from room import room_for

from lcpatch.core.errors import TrainingError
from lcpatch.training import encode, rows, tokens
from lcpatch.training.mixture import CONTINUED, SINKLORA, counts, mix
from lcpatch.training.sources import sources

ROOT = Path(__file__).parents[2]
RECORDS = {
    "natural_questions": lambda n: {"document": f"Page {n}.", "question": "What page?", "short_answer": [f"{n}"]},
    "redpajama": lambda n: {"text": f"{n} " * (CONTINUED + 1) + "end"},
    "book_summaries": lambda n: {"chapter": f"Chapter {n}.", "summary": f"It is the {n}th."},
    "longqa": lambda n: {"instruction": f"Paper {n}. Which is it?", "output": f"Paper {n}."},
}


@pytest.fixture
def data(tmp_path):
    """40 records of each component, every tenth of them of no use."""
    names = {}
    for name, make in RECORDS.items():
        lines = [json.dumps({"other": n} if n % 10 == 9 else make(n)) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        names[name] = [str(tmp_path / f"{name}.jsonl")]
    return names


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_published_proportions(data, tmp_path):
    assert {name: part.share for name, part in SINKLORA.items()} == dict(zip(RECORDS, (44, 27, 18, 11), strict=True))
    found = mix(data, tmp_path / "a.jsonl", rows=50)
    assert found == {"natural_questions": 22, "redpajama": 13, "book_summaries": 9, "longqa": 6}
    made = written(tmp_path / "a.jsonl")
    assert Counter(row["source"] for row in made) == found
    assert len({json.dumps(row) for row in made}) == 50  # nothing twice
    assert made != sorted(made, key=lambda row: row["source"])
    mix(data, tmp_path / "b.jsonl", rows=50)
    assert written(tmp_path / "b.jsonl") == made
    mix(data, tmp_path / "c.jsonl", rows=50, seed=1)
    assert written(tmp_path / "c.jsonl") != made
    assert sorted(p.name for p in tmp_path.glob("*.jsonl") if len(p.stem) == 1) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_conversations(data, tmp_path):
    mix(data, tmp_path / "a.jsonl", rows=50)
    by_source = {row["source"]: [m["content"] for m in row["messages"]] for row in written(tmp_path / "a.jsonl")}
    asked, answer = by_source["natural_questions"]
    assert asked == f"Page {answer}.\n\nAnswer from the text above: What page?"
    asked, answer = by_source["redpajama"]
    assert len(answer) == CONTINUED
    assert asked.startswith("Continue this text.")
    assert answer.endswith("end")
    asked, answer = by_source["book_summaries"]
    assert asked.endswith("Summarize the text above.")
    assert answer.startswith("It is the ")


def test_the_mixture_trains(data, tmp_path):
    """Through the chat template into rows: the last mile of `recipes/sinklora_data.py`."""
    spec = importlib.util.spec_from_file_location("sinklora_data", ROOT / "recipes" / "sinklora_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = [word for name, files in data.items() for word in (f"--{name.replace('_', '-')}", *files)]
    assert module.main([*words, "--rows", "20", "--out", str(tmp_path / "out.jsonl")]) == 0
    tokenizer = copy.deepcopy(eval_cases.tokenizer(special=True))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    store = tokens.build(sources([str(tmp_path / "out.jsonl")]), encode.chats(tokenizer, 8000), tmp_path / "cache")
    assert store.index["records"] == 20
    packed = rows.ChatRows(store, 8000, 0)
    learned = sum(int((packed[n]["labels"] != -100).sum()) for n in range(len(packed)))
    assert 0 < learned == store.learn(0, len(store)).sum()


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(300, 5000))
def test_counts_add_up(shares, count):
    found = counts(shares, count)
    assert sum(found.values()) == count
    assert all(abs(found[n] - count * share / sum(shares.values())) < 1 for n, share in shares.items())


def test_bad_data(data, tmp_path):
    with pytest.raises(
        ValueError, match=r"natural_questions needs 44 records with document.*; 36 of the 40 given ones"
    ):
        mix(data, tmp_path / "a.jsonl", rows=100)
    with pytest.raises(ValueError, match=r"no data for 'longqa'; the mixture needs natural_questions, "):
        mix({k: v for k, v in data.items() if k != "longqa"}, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"'pile' is no part of the mixture"):
        mix({**data, "pile": ["x"]}, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"rows=3 leave none for 'longqa'"):
        mix(data, tmp_path / "a.jsonl", rows=3)
    assert not (tmp_path / "a.jsonl").exists()


def test_where_it_is_written(data, tmp_path):
    """Known before anything is read, which takes long."""
    with pytest.raises(ValueError, match=r"is a folder; name the file to write, such as .*mixture.jsonl"):
        mix({name: ["nothing"] for name in data}, tmp_path, rows=50)
    mix(data, tmp_path / "a" / "b" / "c.jsonl", rows=50)
    assert len(written(tmp_path / "a" / "b" / "c.jsonl")) == 50


def test_a_disk_without_room_for_it(data, tmp_path):
    with room_for(100), pytest.raises(TrainingError, match=r"a.jsonl could not be written \(.* are free .*: make room"):
        mix(data, tmp_path / "out" / "a.jsonl", rows=50)
    assert not list((tmp_path / "out").iterdir())
