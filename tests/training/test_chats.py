"""Conversations as tokens: the prompt is that of inference, only answers are learnt; what no template takes."""

from itertools import pairwise

import eval_cases
import pytest
from data_cases import CHATS, EOS, TEMPLATE, TOKENIZER, chatty, jsonl, store

from lcpatch.training import encode, tokens
from lcpatch.training.sources import sources


def test_only_answers_are_learned(tmp_path):
    made = store(tmp_path, CHATS, encode.chats(chatty(), 100))
    starts = [0, *made.ends]
    learned = []
    for a, b in pairwise(starts):
        ids, learn = made.tokens(a, b), made.learn(a, b)
        learned.append(TOKENIZER.decode(ids[learn]))
        prompt = TOKENIZER.decode(ids[~learn])
        assert learned[-1] not in prompt
    assert learned == ["Hello.</s>", "It is a cat.</s>", " 2</s>"]


def test_a_prompts_tokens_are_those_of_inference(tmp_path):
    made = store(tmp_path, CHATS[:1], encode.chats(chatty(), 100))
    asked = CHATS[0]["messages"][:1]
    text = chatty().apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    want = TOKENIZER(text, add_special_tokens=False).input_ids
    assert made.tokens(0, len(want)).tolist() == want
    assert not made.learn(0, len(want)).any()
    assert made.learn(len(want), len(made)).all()


def test_tools_and_their_calls(tmp_path):
    """The template is given what the model could call, and calls that say nothing; as Parquet has them, too."""
    template = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] if 'content' in m else m['tool_calls'] | length }}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    turns = [{"role": "user", "content": "1 + 1?", "tool_calls": None}, call, {"role": "tool", "content": "2"}]
    said = {"role": "assistant", "content": "Two."}
    made = store(
        tmp_path, [{"messages": [*turns, said], "tools": [{"name": "add"}]}], encode.chats(chatty(template), 100)
    )
    ids, learn = made.tokens(0, len(made)), made.learn(0, len(made))
    assert TOKENIZER.decode(ids) == "[add]<s>user: 1 + 1?assistant: 1</s>tool: 2assistant: Two.</s>"
    assert TOKENIZER.decode(ids[learn]) == "1</s>Two.</s>"
    with pytest.raises(ValueError, match=r"record 1: a record has tools='\[\]', which must be a list"):
        store(tmp_path, [{"messages": [turns[0], said], "tools": "[]"}], encode.chats(chatty(), 100))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_fields_that_another_record_has(tmp_path, form: str):
    """Parquet fills every record up with nulls, and so does what was written from it: a template would tell of them."""

    def record(name: str, **arguments) -> dict:
        tool = {"name": name, "parameters": {field: {"type": "number"} for field in arguments}}
        call = {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}
        turns = [{"role": "user", "content": "?"}, call, {"role": "assistant", "content": "Yes."}]
        return {"messages": turns, "tools": [tool]}

    records = [record("add", a=1, b=2), record("root", of=4)]
    if form == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    else:
        records[0]["tools"][0]["parameters"]["of"] = records[0]["messages"][1]["content"] = None
        records[1]["messages"][1]["tool_calls"][0]["arguments"] |= {"a": None, "b": None}
        jsonl(tmp_path / "x.jsonl", records)
    template = "{{ tools }}{% for m in messages %}{{ m }}{% endfor %}"
    made = tokens.build(
        sources([str(tmp_path / f"x.{form}")]), encode.chats(chatty(template), 1000), tmp_path / "cache"
    )
    text = TOKENIZER.decode(made.tokens(0, len(made)))
    assert text.count("'arguments': {'a': 1, 'b': 2}") == text.count("'arguments': {'of': 4}") == 1
    assert text.count("'parameters': {'of': {'type': 'number'}}") == 1
    assert "None" not in text


@pytest.mark.parametrize("record", [{"text": "a"}, {"messages": []}, {"messages": [{"role": "user", "content": "x"}]}])
def test_records_that_are_no_chats(tmp_path, record):
    says = r"data.jsonl, record 4: a record is no conversation with an answer; its fields: .*Wanted: `messages`"
    with pytest.raises(ValueError, match=says):
        store(tmp_path, [*CHATS, record], encode.chats(chatty(), 100))


def test_long_conversations_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    """As many as have a shard's characters: a list of tokens takes far more memory than they."""
    monkeypatch.setattr(tokens, "SHARD_CHARACTERS", 30)
    made = store(tmp_path, [CHATS[0]] * 7, encode.chats(chatty(), 100))
    assert len(made.index["shards"]) == 4
    assert len(made.ends) == 7


def test_a_prompt_without_a_template_starts_as_texts_do(tmp_path):
    made = store(tmp_path, CHATS[2:], encode.chats(chatty(), 100))
    assert made.tokens(0, len(made)).tolist() == [*TOKENIZER("1 + 1 = 2").input_ids, EOS]


def test_a_prompt_that_says_how_it_starts_or_ends_keeps_its_tokens(tmp_path):
    """One that was written by a template begins with what texts start with, and earlier turns may end in its last."""
    bos, eos = TOKENIZER.bos_token, TOKENIZER.eos_token
    made = store(tmp_path, [{"prompt": f"{bos}1 + 1{eos}", "completion": " = 2"}], encode.chats(chatty(), 100))
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
def test_conversations_that_a_template_does_not_take(tmp_path, template, messages, says):
    with pytest.raises(ValueError, match=says):
        store(tmp_path, [{"messages": messages}], encode.chats(chatty(template), 100))


def test_a_template_that_writes_earlier_turns_otherwise(tmp_path):
    """As Qwen 3's, which drops what was thought: the model will read the last answer's past so, and learns that one."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}(thought) {% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("a", "b", "c", "d"), strict=True)]
    with pytest.warns(UserWarning, match="changes earlier turns"):
        made = store(tmp_path, [{"messages": messages}], encode.chats(chatty(template), 1000))
    prompt, answer = "user: a\nassistant: b\nuser: c\nassistant: ", "(thought) d\n"
    prompt_ids, answer_ids = (TOKENIZER(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    assert made.tokens(0, len(made)).tolist() == prompt_ids + answer_ids
    assert made.learn(0, len(made)).tolist() == [False] * len(prompt_ids) + [True] * len(answer_ids)


def test_templates_that_cannot_be_used(tmp_path):
    template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        store(tmp_path, CHATS[:1], encode.chats(chatty(template), 100))
    with pytest.raises(ValueError, match="has no chat template"):
        store(tmp_path, CHATS[:1], encode.chats(eval_cases.tokenizer(), 100))
