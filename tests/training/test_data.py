"""Sources, tokens on disk, and rows: what a row holds, what it masks, and what is told about bad data."""

import json
import os
import sys
from itertools import chain, pairwise
from types import SimpleNamespace

import eval_cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from noise import distance, model_budget

import lcpatch
from lcpatch.core.errors import TrainingError
from lcpatch.training import encode, rows, tokens
from lcpatch.training.sources import Source, sources

TOKENIZER = eval_cases.tokenizer(special=True)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
TEXTS = ["One sentence.", "Another text, which is rather longer than the first one.", "A third.", "The last of them."]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": "Hello."}]},
    {"instruction": "Say what this is.", "input": "A cat.", "output": "It is a cat."},
    {"prompt": "1 + 1 =", "completion": " 2"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chatty():
    """The tokenizer with a template that takes turns."""
    import copy

    made = copy.deepcopy(TOKENIZER)
    made.chat_template = TEMPLATE
    return made


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def store(tmp_path, records, encoder=None):
    data = sources([jsonl(tmp_path / "data.jsonl", records)])
    return tokens.build(data, encoder or encode.texts(TOKENIZER), tmp_path / "cache", progress=False)


def texts(tmp_path, words=TEXTS):
    return store(tmp_path, [{"text": text} for text in words])


def expected(words=TEXTS):
    return [[*TOKENIZER(text).input_ids, EOS] for text in words]


# Tokens on disk


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


# Rows of text


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_text(tmp_path, masked: bool):
    made = texts(tmp_path)
    documents, flat = expected(), list(chain(*expected()))
    length = 10
    found = rows.TextRows(made, length, masked)
    assert len(found) == len(flat) // length
    place = [n for ids in documents for n in range(len(ids))]
    for number, row in enumerate(found[n] for n in range(len(found))):
        span = slice(number * length, (number + 1) * length)
        assert row["input_ids"].tolist() == flat[span]
        if not masked:
            assert row.keys() == {"input_ids", "labels"}
            assert row["labels"].tolist() == [-100, *flat[span][1:]]
            continue
        positions = place[span]  # a document that goes on from the row before starts anew
        first = next((n for n, p in enumerate(positions) if p == 0), length)
        positions[:first] = range(first)
        assert row["position_ids"].tolist() == positions
        assert row["labels"].tolist() == [-100 if p == 0 else t for p, t in zip(positions, flat[span], strict=True)]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_packed_row_is_its_documents_one_by_one(tmp_path):
    """The loss of a row under every arm is that of its documents alone, weighted by their labels."""
    made = texts(tmp_path)
    row = rows.stack([rows.TextRows(made, len(made))[0]])
    model = build(vocab_size=eval_cases.VOCAB)
    allowed = model_budget(model, row["input_ids"])
    for method, options in [("sf", {}), ("s2", {"block_size": 16, "local_blocks": 1, "stride": 3, "sink_blocks": 0})]:
        lcpatch.apply(model, method, mode="train", **options)
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                packed = model(row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0]
                alone = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in expected()]
            assert distance(packed, torch.cat(alone)) <= allowed


# Rows of chats


def test_only_answers_are_learned(tmp_path, chatty):
    made = store(tmp_path, CHATS, encode.chats(chatty, 100))
    starts = [0, *made.ends]
    learned = []
    for a, b in pairwise(starts):
        ids, learn = made.tokens(a, b), made.learn(a, b)
        learned.append(TOKENIZER.decode(ids[learn]))
        prompt = TOKENIZER.decode(ids[~learn])
        assert learned[-1] not in prompt
    assert learned == ["Hello.</s>", "It is a cat.</s>", " 2</s>"]


def test_a_prompts_tokens_are_those_of_inference(tmp_path, chatty):
    made = store(tmp_path, CHATS[:1], encode.chats(chatty, 100))
    asked = CHATS[0]["messages"][:1]
    want = chatty(
        chatty.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    ).input_ids
    assert made.tokens(0, len(want)).tolist() == want
    assert not made.learn(0, len(want)).any()
    assert made.learn(len(want), len(made)).all()


def test_chats_are_packed_whole(tmp_path, chatty):
    made = store(tmp_path, CHATS, encode.chats(chatty, 100))
    sizes = np.diff([0, *made.ends]).tolist()
    length = max(sizes[0] + sizes[2], sizes[1]) + 3
    found = rows.ChatRows(made, length, pad=7)
    row = found[0]
    assert [len(found[n]["input_ids"]) for n in range(len(found))] == [length] * len(found)
    assert row["input_ids"][sizes[0] :][: sizes[2]].tolist() == made.tokens(made.ends[1], made.ends[2]).tolist()
    empty = length - sizes[0] - sizes[2]
    assert row["input_ids"][-empty:].tolist() == [7] * empty
    assert (row["labels"][-empty:] == -100).all()
    assert row["position_ids"].tolist() == [*range(sizes[0]), *range(sizes[2]), *range(empty)]
    assert (row["labels"] != -100).sum() == made.learn(0, sizes[0]).sum() + made.learn(*made.ends[1:3]).sum()


def test_what_is_too_long_or_without_an_answer_is_left_out(tmp_path, chatty):
    empty = {"prompt": "x", "completion": ""}
    made = store(tmp_path, [*CHATS, {"prompt": "a" * 500, "completion": "b"}, empty], encode.chats(chatty, 60))
    assert made.index["records"] == 5
    assert made.index["left_out"] == 1  # the empty completion still has its end-of-text token to learn
    with pytest.raises(ValueError, match=r"none of 1 records has an answer and at most 5 tokens"):
        rows.ChatRows(store(tmp_path, [{"prompt": "a" * 50, "completion": "b"}], encode.chats(chatty, 5)), 5, 0)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=200))
def test_first_fit(sizes):
    """Every document in one row, no row too full, and no two neighbours that would fit into one."""
    packed = rows.first_fit(sizes, 40)
    assert sorted(chain(*packed)) == list(range(len(sizes)))
    fill = [sum(sizes[n] for n in row) for row in packed]
    assert all(0 < f <= 40 for f in fill)
    assert all(a + b > 40 for a, b in pairwise(fill))


# Bad data


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


def test_too_little_data(tmp_path):
    with pytest.raises(ValueError, match=r"the data has \d+ tokens, and a row 1000: give more data, or a shorter"):
        rows.TextRows(texts(tmp_path, ["One line."]), 1000)
    for length in (-1, 0, 1):
        with pytest.raises(ValueError, match=rf"length={length} must be at least 2 tokens"):
            rows.TextRows(texts(tmp_path), length)
    few = rows.TextRows(texts(tmp_path), 10)
    with pytest.raises(ValueError, match=rf"makes {len(few)} rows, and {len(few)} of them are to be evaluated on"):
        rows.split(few, len(few))
    with pytest.raises(FileNotFoundError, match=r"nothing is no file or folder; a data set on the Hub is written hub:"):
        sources(["nothing"])
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=r"x.json: records are read from .jsonl, one JSON object a line, or .parquet"):
        sources([str(tmp_path / "x.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no .txt, .md, .rst, .jsonl, .parquet file in it"):
        sources([str(tmp_path / "empty")])


@pytest.mark.parametrize("record", [{"text": "a"}, {"messages": []}, {"messages": [{"role": "user", "content": "x"}]}])
def test_records_that_are_no_chats(tmp_path, chatty, record):
    says = r"data.jsonl, record 4: a record is no conversation with an answer; its fields: .*Wanted: `messages`"
    with pytest.raises(ValueError, match=says):
        store(tmp_path, [*CHATS, record], encode.chats(chatty, 100))


def test_tools_and_their_calls(tmp_path, chatty):
    """The template is given what the model could call, and calls that say nothing; as Parquet has them, too."""
    chatty.chat_template = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] if 'content' in m else m['tool_calls'] | length }}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    turns = [{"role": "user", "content": "1 + 1?", "tool_calls": None}, call, {"role": "tool", "content": "2"}]
    said = {"role": "assistant", "content": "Two."}
    made = store(tmp_path, [{"messages": [*turns, said], "tools": [{"name": "add"}]}], encode.chats(chatty, 100))
    ids, learn = made.tokens(0, len(made)), made.learn(0, len(made))
    assert TOKENIZER.decode(ids) == "[add]<s>user: 1 + 1?assistant: 1</s>tool: 2assistant: Two.</s>"
    assert TOKENIZER.decode(ids[learn]) == "1</s>Two.</s>"
    with pytest.raises(ValueError, match=r"record 1: a record has tools='\[\]', which must be a list"):
        store(tmp_path, [{"messages": [turns[0], said], "tools": "[]"}], encode.chats(chatty, 100))


def test_long_conversations_are_encoded_a_few_at_a_time(tmp_path, chatty, monkeypatch):
    """As many as have a shard's characters: a list of tokens takes far more memory than they."""
    monkeypatch.setattr(tokens, "SHARD_CHARACTERS", 30)
    made = store(tmp_path, [CHATS[0]] * 7, encode.chats(chatty, 100))
    assert len(made.index["shards"]) == 4
    assert len(made.ends) == 7


def test_a_prompt_without_a_template_starts_as_texts_do(tmp_path, chatty):
    made = store(tmp_path, CHATS[2:], encode.chats(chatty, 100))
    assert made.tokens(0, len(made)).tolist() == [*TOKENIZER("1 + 1 = 2").input_ids, EOS]


def test_a_prompt_that_says_how_it_starts_or_ends_keeps_its_tokens(tmp_path, chatty):
    """One that was written by a template begins with what texts start with, and earlier turns may end in its last."""
    bos, eos = TOKENIZER.bos_token, TOKENIZER.eos_token
    made = store(tmp_path, [{"prompt": f"{bos}1 + 1{eos}", "completion": " = 2"}], encode.chats(chatty, 100))
    words = TOKENIZER(f"{bos}1 + 1{eos} = 2{eos}", add_special_tokens=False).input_ids
    assert made.tokens(0, len(made)).tolist() == words


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('no system role') }}", CHATS[0]["messages"], "conversation of user: no system role; mend"),
        ("{{ messages[0].x.y }}", CHATS[0]["messages"], "'dict object' has no attribute 'x'"),
        (TEMPLATE, CHATS[0]["messages"][1:], "no conversation of no one before the assistant"),
    ],
)
def test_conversations_that_a_template_does_not_take(tmp_path, chatty, template, messages, says):
    chatty.chat_template = template
    with pytest.raises(ValueError, match=says):
        store(tmp_path, [{"messages": messages}], encode.chats(chatty, 100))


def test_a_template_that_writes_earlier_turns_otherwise(tmp_path, chatty):
    """As Qwen 3's, which drops what was thought: the model will read the last answer's past so, and learns that one."""
    chatty.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}(thought) {% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("a", "b", "c", "d"), strict=True)]
    with pytest.warns(UserWarning, match="changes earlier turns"):
        made = store(tmp_path, [{"messages": messages}], encode.chats(chatty, 1000))
    prompt, answer = "user: a\nassistant: b\nuser: c\nassistant: ", "(thought) d\n"
    prompt_ids, answer_ids = (TOKENIZER(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    assert made.tokens(0, len(made)).tolist() == prompt_ids + answer_ids
    assert made.learn(0, len(made)).tolist() == [False] * len(prompt_ids) + [True] * len(answer_ids)


def test_templates_that_cannot_be_used(tmp_path, chatty):
    chatty.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        store(tmp_path, CHATS[:1], encode.chats(chatty, 100))
    with pytest.raises(ValueError, match="has no chat template"):
        store(tmp_path, CHATS[:1], encode.chats(eval_cases.tokenizer(), 100))
