"""What the data's tests read, a tokenizer to read it with, and what its tokens must be."""

import copy
import json
from pathlib import Path

import eval_cases

from lcpatch.training import encode, tokens
from lcpatch.training.sources import sources

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


def chatty(template=TEMPLATE):
    """The tokenizer with a template that takes turns."""
    made = copy.deepcopy(TOKENIZER)
    made.chat_template = template
    return made


def jsonl(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def store(tmp_path: Path, records, encoder=None):
    data = sources([jsonl(tmp_path / "data.jsonl", records)])
    return tokens.build(data, encoder or encode.texts(TOKENIZER), tmp_path / "cache", progress=False)


def texts(tmp_path: Path, words=TEXTS):
    return store(tmp_path, [{"text": text} for text in words])


def expected(words=TEXTS):
    return [[*TOKENIZER(text).input_ids, EOS] for text in words]
