"""`evaluate`: a plain loop's scores, one reading of a context, caches, resuming, and every kind of bad input."""

import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import models
import pytest
import torch
from eval_cases import DOCUMENTS, LENGTH, OPTIONS, model, task, text, tokenizer
from noise import model_budget
from torch.nn import functional as F

import lcpatch
from lcpatch.caches import GrowingLayer, LongCache, caches
from lcpatch.core.options import parse_options
from lcpatch.eval import Arm, evaluate, tasks
from lcpatch.eval.arms import sort_options
from lcpatch.eval.ask import split
from lcpatch.eval.reader import Reader
from lcpatch.eval.text import Text, read_documents
from lcpatch.training import sources

S2 = Arm("s2", models.SHORT["s2"])
S2_CACHED = Arm("s2", models.SHORT["s2"], "s2")


DENSE = (Arm(),)


def run(*names, arms=DENSE, lengths=(LENGTH,), seeds=2, options=None, tok=None, **given):
    options = {k: v for name in names for k, v in OPTIONS.get(name, {}).items()} if options is None else options
    given = {"documents": DOCUMENTS, **given}
    return evaluate(model(), tok or tokenizer(), names, lengths, arms=arms, seeds=seeds, options=options, **given)


def plain(net, ids, new_tokens):
    """What the model writes after `ids`, by transformers alone."""
    ids = torch.tensor([ids])
    written = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return written[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["passkey", "needle", "vt", "topic"])
def test_equals_a_plain_loop(name):
    seeds, options = 2, {**OPTIONS.get(name, {}), **({"depths": 1} if "depths" in OPTIONS.get(name, {}) else {})}
    net, words, seen = model(), text(), run(name, seeds=seeds, options=options)
    chosen = tasks.get(name)(**options)
    budget = 2 * model_budget(net, torch.tensor([words.stream[:LENGTH].tolist()]))
    for row, unit in zip(seen.rows, chosen.units(words, LENGTH, range(seeds)), strict=True):
        sample = chosen.sample(words, unit)
        for question, result in zip(sample.questions, row["questions"], strict=True):
            costs = []
            for candidate in question.candidates:
                prompt, (rest,) = split(words, question.prompt, (candidate,))
                ids = torch.tensor([sample.context + prompt + rest])
                with torch.no_grad():
                    logits = net(ids).logits[0, -len(rest) - 1 : -1]
                costs.append(float(F.cross_entropy(logits, torch.tensor(rest), reduction="sum")))
            best = sorted(question.candidates, key=lambda c: costs[question.candidates.index(c)])
            kept = best[: len(question.answers)]
            assert result["rank"] == sum(c in question.answers for c in kept) / len(kept)
            right = [costs[question.candidates.index(answer)] for answer in question.answers]
            assert abs(result["nats"] - sum(right) / len(right)) <= budget * len(rest)
            written = plain(net, sample.context + prompt, 40)
            assert words.decode(written).startswith(result["written"].rstrip("\N{REPLACEMENT CHARACTER}"))


def test_perplexity_equals_a_plain_loop():
    net, words = model(), text()
    seen = run("perplexity", lengths=[200], options={"max_windows": 3})
    for row in seen.rows:
        ids = words.stream[row["start"] : row["start"] + 200][None]
        with torch.no_grad():
            logits = net(ids[:, :-1]).logits
        nll = F.cross_entropy(logits[0], ids[0, 1:])
        assert abs(row["nll"] - float(nll)) <= 2 * model_budget(net, ids)
        assert row["bytes"] == len(words.decode(ids[0, 1:]).encode())
        assert sum((b - a) * mean for a, b, mean in row["positions"]) == pytest.approx(199 * row["nll"])
    assert [row["start"] % 256 for row in seen.rows] == [0, 0, 0]


def test_sliding_scores_the_end_of_each_window():
    whole = run("perplexity", lengths=[256], options={"max_windows": 2})
    end = run("perplexity", lengths=[256], options={"max_windows": 2, "protocol": "sliding", "last": 64})
    assert end.rows[0]["tokens"] == 64
    assert end.rows[1]["start"] % 64 == 0
    tail = [mean * (b - a) for a, b, mean in whole.rows[0]["positions"] if a >= 255 - 64]
    assert end.rows[0]["nll"] == pytest.approx(sum(tail) / 64)
    with pytest.raises(ValueError, match="last=256 must be less than the length"):
        run("perplexity", lengths=[256], options={"protocol": "sliding"})


def test_a_bos_stands_before_every_window():
    seen = []
    net, tok = model(), tokenizer(True)
    net.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    evaluate(net, tok, lengths=[100], documents=DOCUMENTS, options={"max_windows": 2})
    windows = [ids for ids in seen if ids.shape[1] > 1]
    assert [ids.shape[1] for ids in windows] == [99, 99]
    assert all(ids[0, 0] == tok.bos_token_id for ids in windows)


def test_documents_are_joined():
    assert text().stream.tolist() == text().encode(DOCUMENTS[0])
    plain_text, marked = (Text(tokenizer(s), ["one.", "two."], "x") for s in (False, True))
    assert plain_text.decode(plain_text.stream) == "one.\n\ntwo."
    assert marked.stream.tolist().count(tokenizer(True).eos_token_id) == 1


# Arms


def test_a_context_is_read_once_for_all_questions():
    net, fed = model(), []
    net.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    evaluate(net, tokenizer(), ["niah_multiquery"], [LENGTH], documents=DOCUMENTS, seeds=1)
    assert sum(n > LENGTH // 2 for n in fed) == 1
    assert sum(n > 20 for n in fed) == 1 + 4  # the context and four questions


@pytest.mark.parametrize("name", ["needle", "multiturn", "perplexity"])
def test_a_cache_that_drops_nothing_needed_changes_nothing(name):
    """S2's cache gives the tokens of the full cache, so every question must start from an untouched one."""
    options = {"needle": {"depths": 1, "needles": 2}, "perplexity": {"max_windows": 2}}.get(name, {})
    seen = run(name, arms=[S2, S2_CACHED, Arm("s2", models.SHORT["s2"], chunk=100)], options=options)
    if name == "perplexity":
        budget = 2 * model_budget(model(), text().stream[None, :LENGTH])
        values = [seen.value(name, LENGTH, "nll", arm) for arm in seen.arms]
        assert max(values) - min(values) <= budget
    for metric in () if name == "perplexity" else ("rank", "generate"):
        assert len({seen.value(name, LENGTH, metric, arm) for arm in seen.arms}) == 1
    dense = run(name, options=options)
    key = "positions" if name == "perplexity" else "questions"
    assert dense.rows[0][key] != seen.rows[0][key]


def test_arms_leave_the_model_as_it_was():
    net = model().train()
    before = dict(net.config.__dict__)
    evaluate(net, tokenizer(), lengths=[100], documents=DOCUMENTS, arms=[Arm(), S2_CACHED], options={"max_windows": 1})
    assert net.training
    assert net.config.__dict__ == before
    lcpatch.apply(net, "sink", window=9)
    report = evaluate(
        net, tokenizer(), lengths=[100], documents=DOCUMENTS, arms=[Arm(), S2], options={"max_windows": 1}
    )
    assert report.header["patch"]["method"] == "sink"
    assert lcpatch.report(net)[0].method == "sink"


def test_arms_read_from_text():
    both = Arm("sink", {"window": 8}, "h2o", {"budget": 1})
    assert Arm.parse("sink --window 8 --cache h2o --budget 1", parse_options) == both
    assert Arm.parse("dense", parse_options) == Arm()
    assert Arm.parse("--cache s2", parse_options).cache == "s2"
    with pytest.raises(ValueError, match=r"--cache needs a name; choices: .*s2"):
        Arm.parse("--cache", parse_options)
    with pytest.raises(ValueError, match="unknown cache 'nope'"):
        Arm(cache="nope")
    with pytest.raises(ValueError, match="chunk=0"):
        Arm(chunk=0)


def test_a_new_cache_needs_only_its_name(monkeypatch):
    """One that routes the attention of an unpatched model, as its constructor may; afterwards no trace is left."""
    made = []

    class Fake(LongCache):
        def __init__(self, net, budget=1.0):
            made.append((net, budget))
            super().__init__(layers=[GrowingLayer() for _ in range(net.config.num_hidden_layers)])

    caches.all()
    monkeypatch.setitem(caches._classes, "fake", Fake)
    of_method, of_cache, rest = sort_options({"budget": 0.2, "digits": 3, "stride": 4}, "s2", "fake")
    assert (of_method, of_cache, rest) == ({"stride": 4}, {"budget": 0.2}, {"digits": 3})
    seen = run("needle", arms=[Arm(), Arm(cache="fake", cache_options=of_cache)], seeds=1, options={"depths": 1})
    assert seen.arms[1] == "fake cache(budget=0.2)"
    assert made[0][1] == 0.2
    dense, cached = seen.rows
    assert [q["written"] for q in dense["questions"]] == [q["written"] for q in cached["questions"]]


def test_an_option_of_both_is_refused(monkeypatch):
    class Both(LongCache):
        def __init__(self, net, stride=1):
            pass

    caches.all()
    monkeypatch.setitem(caches._classes, "both", Both)
    with pytest.raises(ValueError, match="--stride is an option of the method 's2' and of the cache 'both'"):
        sort_options({"stride": 4}, "s2", "both")


def test_an_arm_that_would_run_dense_says_so():
    with pytest.warns(UserWarning, match="sf with mode='train' runs dense"):
        run("perplexity", arms=[Arm("sf")], lengths=[100], options={"max_windows": 1})


def test_candidates_side_by_side_cost_what_they_cost_alone():
    net, words = model(), text()
    sample = task("needle").sample(words, next(task("needle").units(words, LENGTH, [0])))
    question = sample.questions[0]
    prompt, candidates = split(words, question.prompt, question.candidates)
    costs = []
    for size in (1, 3, 100):
        reader = Reader(net, batch_size=size)
        reader.read(sample.context)
        costs.append(reader.ask(prompt, candidates, 0, set())[0])
        assert reader.cache.get_seq_length() == len(sample.context)
    budget = 2 * model_budget(net, torch.tensor([sample.context])) * max(map(len, candidates))
    for other in costs[1:]:
        assert all(abs(a - b) <= budget for a, b in zip(costs[0], other, strict=True))


# Resuming


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    given = {"lengths": [300], "arms": [Arm(), S2]}
    full = run("passkey", out=tmp_path / "whole", **given)
    lines = (tmp_path / "whole" / "results.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "part"
    part.mkdir()
    (part / "results.jsonl").write_text("".join(lines[:4]) + lines[4][:25])
    with pytest.warns(UserWarning, match="line 5 was cut off and is measured again; 4 are kept"):
        again = run("passkey", out=part, **given)
    assert [{**row, "questions": 0} for row in again.rows] == [{**row, "questions": 0} for row in full.rows]
    assert (part / "results.jsonl").read_text().splitlines(keepends=True)[:4] == lines[:4]
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("read again"))
    assert run("passkey", out=part, **given).rows == again.rows


def test_a_killed_process_loses_nothing(tmp_path):
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from eval_cases import *; from lcpatch.eval import evaluate; from lcpatch.eval.store import Store\n"
        "add = Store.add\n"
        "def dying(self, key, row):\n"
        "    add(self, key, row)\n"
        "    if len(self.rows) == 3: os._exit(9)\n"
        "Store.add = dying\n"
        "given = {'documents': DOCUMENTS, 'out': sys.argv[1], 'options': {'depths': 3}}\n"
        "evaluate(model(), tokenizer(), ['passkey'], [300], **given)\n"
    )
    root = Path(__file__).parents[2]
    paths = [root, root / "tests", root / "kernels" / "torch-ext"]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
    assert len(run("passkey", lengths=[300], seeds=3, out=tmp_path).rows) == 9
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [lines[0], "{broken\n", *lines[2:]],
            "line 2 is no result of `lcpatch eval`; nothing was changed",
        ),
        (lambda lines: ['{"some": "json"}\n', *lines[1:]], "line 1 is no result"),
        (lambda lines: [lines[0].replace('"schema": 1', '"schema": 99'), *lines[1:]], "has schema 99"),
        (lambda lines: [lines[0].replace('"chat": false', '"chat": true'), *lines[1:]], "a run with chat=True"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_kept(change, message, tmp_path):
    run("passkey", lengths=[300], out=tmp_path, options={"depths": 1})
    file = tmp_path / "results.jsonl"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        run("passkey", lengths=[300], out=tmp_path, options={"depths": 1})
    assert file.read_bytes() == before


def test_more_seeds_and_lengths_go_into_the_same_file(tmp_path):
    small = run("passkey", lengths=[300], out=tmp_path, seeds=1, options={"depths": 1})
    large = run("passkey", "multiturn", lengths=[300, 400], out=tmp_path, seeds=2, options={"depths": 1})
    assert small.rows[0] == large.rows[0]
    header, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert header["schema"] == 1
    assert len({row["key"] for row in rows}) == len(rows) == 8


# Bad input


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("--cache h2o --budget 2.5", "budget=2.5 must be tokens"),
        ("s2 --stride 0", "stride=0 must be"),
        ("s2 --layers 77", "77"),
        ("--cache s2", "S2Cache needs a model patched with s2"),
    ],
)
def test_an_arm_that_cannot_be_fails_before_the_others_are_measured(arm, message, tmp_path):
    arms = [Arm(), Arm.parse(arm, parse_options)]
    with pytest.raises(ValueError, match=message):
        run("passkey", lengths=[300], out=tmp_path, arms=arms)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("--cache h2o --buget 0.2", "no option 'buget'. Did you mean 'budget'?"),
        ("s2 --strid 4 --cache s2", "no option 'strid'. Did you mean 'stride'?"),
        ("dense --stride 4", "options are of a --method or a --cache: name one"),
    ],
)
def test_an_option_that_an_arm_does_not_have(arm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Arm.parse(arm, parse_options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"documents": ["short."]}, "the given documents has .* tokens, but .* needed: give more text"),
        ({"lengths": [5000]}, "beyond the 4096 positions of this model.*--beyond"),
        ({"lengths": []}, "at least one"),
        ({"lengths": [1]}, "at least 2 tokens"),
        ({"arms": []}, "arms need labels"),
        ({"arms": [Arm(), Arm()]}, "arms need labels"),
        ({"seeds": 0}, "seeds must be at least one"),
        ({"score": "guess"}, "score='guess' is not one of generate, rank, both"),
        ({"chat": True}, "no chat template; leave --chat out"),
        ({"options": {"digit": 7}}, "no option 'digit' in perplexity; they have: last, max_windows, protocol"),
    ],
)
def test_bad_input_is_a_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        run("perplexity", **given)


def test_beyond_the_positions_if_asked():
    assert run("perplexity", lengths=[4200], options={"max_windows": 1}, beyond=True).rows


def test_files_and_folders(tmp_path):
    for name, content in (("b.txt", "two"), ("a.md", "one"), ("c.bin", "no")):
        (tmp_path / name).write_text(content)
    assert read_documents([tmp_path]) == (["one", "two"], tmp_path.name)
    assert read_documents([tmp_path / "c.bin"])[0] == ["no"]
    assert read_documents(None)[1] == "pydoc_data.topics"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00x", "is not UTF-8 text"), (b"a\0b", "NUL bytes")],
)
def test_bad_files(content, message, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([file])


def test_bad_folders(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"has no \.txt, \.md or \.rst file in it"):
        read_documents([tmp_path])
    with pytest.raises(FileNotFoundError):
        read_documents([tmp_path / "nothing.txt"])


def test_tables_and_data_sets_are_read(tmp_path, monkeypatch):
    table = tmp_path / "x.jsonl"
    table.write_text("".join(json.dumps({"body": f"document {n}"}) + "\n" for n in range(5)))
    assert read_documents([table], "body", 3) == (["document 0", "document 1", "document 2"], "x.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl has a record without text in 'text'; its fields are: body"):
        read_documents([table])
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return ({"text": f"{name} {n}"} for n in itertools.count())  # endless: only what is wanted is read

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "_revision", lambda repository: "abc")
    plain = tmp_path / "a.txt"
    plain.write_text("words")
    assert read_documents(["hub:me/data@test", plain], records=2) == (
        ["me/data 0", "me/data 1", "words"],
        "hub:me/data@test, a.txt",
    )
    assert asked == [("me/data", {"split": "test", "streaming": True, "revision": "abc"})]


def test_rows_say_what_a_cache_holds_of_the_context():
    """In bytes, of keys and values: all tokens densely, a tenth of them by H2O, whose masses come on top."""
    h2o = Arm(cache="h2o", cache_options={"budget": 0.1})
    seen = run("passkey", arms=(Arm(), h2o), seeds=1)
    config = model().config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for row in seen.rows_of("passkey", "dense"):
        assert row["cache_bytes"] == row["tokens"] * token
    for row in seen.rows_of("passkey", h2o.label):
        assert 0.1 * row["tokens"] * token < row["cache_bytes"] < 0.5 * row["tokens"] * token
