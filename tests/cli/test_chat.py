"""`lcpatch chat` through a pipe: what is said goes through the cache once, and is answered as generate does."""

import io
import re
import signal

import pytest
import torch
from cache_cases import ALL
from eval_cases import model, tokenizer

from lcpatch.cli import _conversation, main

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LINES = ["tell me of the lambda expressions of python", "and of its classes?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny saved model without a chat template, and the same with one."""
    found = {}
    for kind in ("plain", "chat"):
        path = tmp_path_factory.mktemp(kind)
        model().save_pretrained(path)
        words = tokenizer(special=kind == "chat")
        words.chat_template = TEMPLATE if kind == "chat" else None
        words.save_pretrained(path)
        found[kind] = path
    return found


def chat(monkeypatch, capsys, *argv, lines=LINES):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n\n"))
    status = main(["chat", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("name", [None, *ALL])
def test_a_conversation(name, kind, folders, monkeypatch, capsys):
    words = [] if name is None else ["--cache", name, "--chunk", "16"]
    words += ["--method", "s2", "--block-size", "16", "--local-blocks", "1", "--stride", "3"] if name == "s2" else []
    words += ["--budget", "24"] if name in ("h2o", "sink") else []
    status, out, err = chat(monkeypatch, capsys, folders[kind], "--new-tokens", "8", *words)
    assert status == 0, err
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == LINES
    notes = re.findall(r"\[(\d+) tokens seen, (\d+) kept a head, [\d.]+ MiB.*; first token after [\d.]+ s", out)
    assert len(notes) == 2
    (first, kept), (second, _) = ((int(a), int(b)) for a, b in notes)
    assert second > first
    assert kept == first if name is None else kept <= first
    assert kept <= 24 or name not in ("h2o", "sink")


def test_answers_are_those_of_generate_and_turns_are_read_once(folders, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, out, _ = chat(monkeypatch, capsys, folders["chat"], "--new-tokens", "8", "--system", "be brief")
    assert status == 0
    mine, words = AutoModelForCausalLM.from_pretrained(folders["chat"]), AutoTokenizer.from_pretrained(folders["chat"])
    messages, ids = [{"role": "system", "content": "be brief"}], None
    for line in LINES:
        messages.append({"role": "user", "content": line})
        whole = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = words(whole, return_tensors="pt", add_special_tokens=False).input_ids
        done = mine.generate(ids, max_new_tokens=8, do_sample=False)
        answer = words.decode(done[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        if line == LINES[0]:
            assert answer.strip()[:20] in out
    seen = [int(n) for n in re.findall(r"\[(\d+) tokens seen", out)]
    assert seen[0] < seen[1] < 2 * seen[0] + 60


def test_a_compiled_cache_is_decoded_ahead_with_the_same_answers(folders, monkeypatch, capsys):
    calls, real = [], _conversation.decode_ahead

    def spy(*args, stream_to, **kwargs):
        calls.append(stream_to)
        return real(*args, stream_to=stream_to, **kwargs)

    monkeypatch.setattr(_conversation, "decode_ahead", spy)
    texts = []
    for compiled in ("false", "true"):
        words = ("--cache", "h2o", "--budget", "40", "--compiled", compiled, "--new-tokens", "8")
        status, out, err = chat(monkeypatch, capsys, folders["chat"], *words)
        assert status == 0, err
        assert len(calls) == (2 if compiled == "true" else 0)
        texts.append([line for line in out.splitlines() if not line.startswith("[")])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("words", [(), ("--cache", "h2o", "--budget", "40"), ("--cache", "h2o", "--compiled", "true")])
def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(words, folders, monkeypatch, capsys):
    """At the third token of the first answer."""
    from transformers import TextStreamer

    real, come = TextStreamer.put, []

    def put(self, value):
        come.append(value)
        if len(come) == 4:  # the prompt comes first
            signal.raise_signal(signal.SIGINT)
        real(self, value)

    monkeypatch.setattr(TextStreamer, "put", put)
    handler = signal.getsignal(signal.SIGINT)
    status, out, err = chat(monkeypatch, capsys, folders["plain"], "--new-tokens", "12", *words)
    assert status == 0, err
    assert signal.getsignal(signal.SIGINT) is handler
    assert re.findall(r"^> (.*)", out, re.MULTILINE) == LINES
    prompts = [n for n, value in enumerate(come) if value.numel() > 1]
    assert prompts[0] == 0
    assert prompts[1] in (4, 5)  # who decodes ahead has one token more by then
    assert len(come) == prompts[1] + 13


def test_a_second_ctrl_c_interrupts(folders, monkeypatch, capsys):
    from transformers import TextStreamer

    def put(self, value):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextStreamer, "put", put)
    status, _, err = chat(monkeypatch, capsys, folders["plain"])
    assert status == 130
    assert "interrupted" in err


def test_a_budget_that_is_too_small_for_a_prompt_still_answers(folders, monkeypatch, capsys):
    status, out, err = chat(
        monkeypatch, capsys, folders["plain"], "--cache", "h2o", "--budget", ".2", "--new-tokens", "5", lines=["hi"]
    )
    assert status == 0, err
    assert "5 kept" in out


def test_what_is_read_and_how_it_is_stored_are_chosen_apart(folders, monkeypatch, capsys):
    words = "--cache retrieval --budget 48 --page 4 --recent 4 --offload --codec int8 --new-tokens 8"
    status, out, err = chat(monkeypatch, capsys, folders["plain"], *words.split())
    assert status == 0, err
    assert len(re.findall(r"tokens seen, \d+ kept a head", out)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cache nope", "unknown cache 'nope'"),
        ("--cache h2o --budgt 3", "no option 'budgt'. Did you mean 'budget'? the cache 'h2o' has budget, codec, "),
        ("--budget 3", "options are of a --method or a --cache: name one"),
        ("--chunk 4", "--chunk 4 is for a cache of lcpatch's: add --cache CACHE"),
        ("--cache retrieval --codec int8", "give offload=True, or leave codec out"),
        ("--cache retrieval --budget 100", "at least 176 with page=16, or smaller pages"),
        ("--cache s2", "or --method s2"),
        ("--cache h2o --budget 0", "budget=0 must be"),
        ("--new-tokens 0", "--new-tokens 0 must be at least 1"),
        ("--temperature -1", "--temperature -1.0 must be at least 0"),
    ],
)
def test_refusals(words, message, folders, monkeypatch, capsys):
    status, _, err = chat(monkeypatch, capsys, folders["plain"], *words.split())
    assert status == 2
    assert message in err


def test_what_is_no_text_is_answered_all_the_same(folders, monkeypatch, capsys):
    """As a terminal or a pipe hands it over: bytes that are no UTF-8 come as lone surrogates."""
    line = b"Hi \xff there".decode(errors="surrogateescape")
    status, out, err = chat(monkeypatch, capsys, folders["plain"], "--new-tokens", "3", lines=[line])
    assert status == 0, err
    assert "> Hi \ufffd there" in out


def test_a_folder_without_a_model(tmp_path, monkeypatch, capsys):
    status, _, err = chat(monkeypatch, capsys, tmp_path)
    assert status == 2
    assert "is no folder with a model in it: it has no config.json" in err


def test_the_model_is_left_as_it_was(folders):
    from lcpatch.eval.arms import Arm
    from lcpatch.hf.route import is_routed

    mine = model()
    with Arm(cache="h2o", cache_options={"budget": 24}).on(mine) as make:
        mine.generate(torch.arange(5, 50)[None], past_key_values=make(), max_new_tokens=3)
        assert is_routed(mine)
    assert not is_routed(mine)
