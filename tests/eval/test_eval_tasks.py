"""Every task: samples repeat, fit and can be answered; an oracle knows everything, a broken model nothing."""

import math

import pytest
import torch
from eval_cases import DOCUMENTS, LENGTH, OPTIONS, QA_TASKS, VOCAB, Oracle, model, task, text, tokenizer

from lcpatch.eval import evaluate, tasks
from lcpatch.eval.task import new_tokens, task_names


@pytest.mark.parametrize("name", QA_TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_samples_repeat_and_fit(name, chat):
    words = text(chat, special=chat)
    unit, other = list(task(name).units(words, LENGTH, [0, 1]))[:2]
    sample = task(name).sample(words, unit)
    assert sample == task(name).sample(text(chat, special=chat), unit)
    assert sample != task(name).sample(words, other)
    asked = [len(words.encode(q.prompt + words.after)) + new_tokens(words, q) for q in sample.questions]
    size = len(words.opening) + len(sample.context) + (sum(asked) if sample.turns else max(asked))
    assert 0.8 * LENGTH <= size <= LENGTH


@pytest.mark.parametrize("name", QA_TASKS)
def test_answers_stand_in_the_context(name):
    words = text()
    for unit in task(name).units(words, LENGTH, range(4)):
        sample = task(name).sample(words, unit)
        written = words.decode(sample.context)
        for question in sample.questions:
            assert all(choice in written for choice in question.answers)
            assert set(question.answers) < set(question.candidates)
            assert len(set(question.candidates)) == len(question.candidates)


@pytest.mark.parametrize("name", QA_TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_an_oracle_scores_everything(name, chat):
    words = text(chat, special=chat)
    oracle, seeds = Oracle(words), range(2)
    for unit in task(name).units(words, LENGTH, seeds):
        oracle.learn(task(name).sample(words, unit))
    report = evaluate(
        oracle, words.tokenizer, [name], [LENGTH], documents=DOCUMENTS, seeds=2, chat=chat, options=OPTIONS.get(name)
    )
    assert report.value(name, LENGTH, "rank") == 1
    assert report.value(name, LENGTH, "generate") == 1


@pytest.fixture(scope="module")
def broken():
    """A model whose weights are shuffled."""
    shuffled, order = model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel(), generator=order)].view_as(parameter))
    return shuffled


def is_chance(mean, chance, samples):
    """Whether guessing would score so high, or so low, in more than one of a thousand tests of so many samples."""
    odds = [math.comb(samples, k) * chance**k * (1 - chance) ** (samples - k) for k in range(samples + 1)]
    right = round(mean * samples)
    return min(sum(odds[right:]), sum(odds[: right + 1])) > 1 / 2000


@pytest.mark.parametrize("name", QA_TASKS)
def test_a_broken_model_guesses(name, broken):
    options = OPTIONS.get(name, {}) | ({"depths": 1} if "depths" in OPTIONS.get(name, {}) else {})
    given = {"documents": DOCUMENTS, "options": options}
    report = evaluate(broken, tokenizer(), [name], [LENGTH], seeds=24, score="rank", **given)
    (cell,) = report.cells
    assert is_chance(cell["mean"], cell["chance"], 24)
    written = evaluate(broken, tokenizer(), [name], [LENGTH], seeds=1, score="generate", **given)
    assert written.value(name, LENGTH, "generate") == 0


def test_a_broken_model_is_no_better_than_uniform(broken):
    report = evaluate(broken, tokenizer(), documents=DOCUMENTS, lengths=[64, 300], options={"max_windows": 5})
    for cell in report.cells:
        if cell["metric"] == "nll":
            assert cell["perplexity"] >= VOCAB


def test_ruler_is_a_suite():
    names = task_names(["ruler", "needle", "vt"])
    assert names[-1] == "needle"
    assert names.count("vt") == 1
    assert {tasks.get(name).suite for name in names[:-1]} == {"ruler"}
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        task_names(["nope"])


def test_needles_lie_at_their_depth():
    words = text()
    for depth, unit in ((u.facts["depth"], u) for u in tasks.get("needle")(depths=5).units(words, LENGTH, [0])):
        sample = tasks.get("needle")().sample(words, unit)
        written = words.decode(sample.context)
        at = written.index(sample.questions[0].answers[0]) / len(written)
        near = max(map(len, written.split("."))) / len(written) + 0.1  # it goes to the next end of a sentence
        assert abs(at - depth) <= near


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("passkey", {"digits": 1, "choices": 10}, "choices=10"),
        ("needle", {"needles": 0}, "needles=0"),
        ("niah_multikey", {"keys": 1}, "keys=1"),
        ("niah_multivalue", {"values": 0}, "values=0"),
        ("niah_multiquery", {"queries": 1}, "queries=1"),
        ("vt", {"hops": 0}, "hops=0"),
        ("cwe", {"ratio": 1}, "ratio=1"),
        ("fwe", {"words": 3}, "words=3"),
        ("qa", {"questions": 1}, "questions=1"),
        ("topic", {"topics": 1}, "topics=1"),
        ("multiturn", {"turns": 1}, "turns=1"),
        ("perplexity", {"protocol": "mine"}, "protocol='mine' is not one of longlora, sliding"),
        ("perplexity", {"last": 0}, "last=0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name)(**options)


@pytest.mark.parametrize("name", QA_TASKS)
def test_too_short_a_length_is_a_sentence(name):
    with pytest.raises(ValueError, match=f"{name} at 40 tokens: .*(need|fit|longer|hold)"):
        evaluate(model(), tokenizer(), [name], [40], documents=DOCUMENTS)


def test_filled_haystack():
    words, filled = text(), tasks.get("niah_multikey")(filled=True)
    (unit,) = filled.units(words, LENGTH, [0])
    sample = filled.sample(words, unit)
    assert words.decode(sample.context).count("magic numbers") > 8
