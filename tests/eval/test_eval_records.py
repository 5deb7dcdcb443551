"""LongBench and InfiniteBench from local files in their format, and every metric by hand."""

import json
import sys
from types import ModuleType

import pytest
from eval_cases import DOCUMENTS, Oracle, model, text, tokenizer

from lcpatch.eval import evaluate, tasks
from lcpatch.eval.metrics import METRICS
from lcpatch.eval.task import Question

CONTEXT = "Passage 1: Mr. Weston lives at Randalls. " * 60
V1 = {
    "input": "Where does Mr. Weston live?", "context": CONTEXT, "answers": ["Randalls"], "length": 420,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "1",
}  # fmt: skip
TREC = {**V1, "input": "Question: Who? Type:", "answers": ["Person"], "all_classes": ["Person", "Place", "Number"]}
V2 = {
    "_id": "1", "domain": "QA", "sub_domain": "one", "difficulty": "easy", "length": "short", "question": "Where?",
    "choice_A": "Highbury", "choice_B": "Randalls", "choice_C": "Hartfield", "choice_D": "London", "answer": "B",
    "context": CONTEXT,
}  # fmt: skip
BOOK = {"id": 0, "context": CONTEXT, "input": "Where?", "answer": ["Randalls"], "options": []}
CHOICE = {**BOOK, "options": ["Highbury", "Hartfield", "Randalls", "London"]}
DEBUG = {**BOOK, "answer": ["parse", "C"], "options": ["load", "dump", "parse", "main"]}

CASES = {
    "f1": ("longbench", "hotpotqa", V1),
    "classes": ("longbench", "trec", TREC),
    "v2": ("longbench_v2", "all", V2),
    "book": ("infinitebench", "longbook_qa_eng", BOOK),
    "choice": ("infinitebench", "longbook_choice_eng", CHOICE),
    "debug": ("infinitebench", "code_debug", DEBUG),
}


def write(folder, subset, *records):
    (folder / f"{subset}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_an_oracle_answers_records(case, tmp_path):
    name, subset, record = CASES[case]
    options = {"subset": subset, "data": write(tmp_path, subset, record, record)}
    words, task = text(), tasks.get(name)(**options)
    units = list(task.units(words, 400, [0]))
    assert len(units) == 2
    oracle = Oracle(words)
    sample = task.sample(words, units[0])
    oracle.learn(sample)
    assert len(sample.context) < len(words.encode(CONTEXT))  # cut in the middle
    report = evaluate(oracle, tokenizer(), [name], [400], documents=DOCUMENTS, options=options)
    assert report.value(name, 400, "generate") == 1
    if case in ("classes", "v2", "choice", "debug"):
        assert report.value(name, 400, "rank") == 1


@pytest.mark.parametrize("name", ["longbench", "infinitebench"])
def test_every_subset_makes_a_question(name, tmp_path):
    for subset in tasks.get(name).subsets:
        record = {**V1, **CHOICE, "answers": ["Randalls"]}
        task = tasks.get(name)(subset=subset, data=write(tmp_path, subset, record))
        sample = task.sample(text(), next(task.units(text(), 300, [0])))
        assert 0 < len(sample.context) < 300


def test_bad_data(tmp_path):
    def run(content, **options):
        (tmp_path / "hotpotqa.jsonl").write_text(content)
        given = {"subset": "hotpotqa", "data": str(tmp_path), **options}
        return evaluate(model(), tokenizer(), ["longbench"], [300], documents=DOCUMENTS, options=given)

    with pytest.raises(ValueError, match="line 1 is not JSON"):
        run("{")
    with pytest.raises(ValueError, match="no subset 'dureader'; choices: narrativeqa"):
        run("", subset="dureader")
    with pytest.raises(FileNotFoundError):
        run("", data=str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("3\n", "not a record but int"), ('{"input": "x"}\n', "no field 'context'; is it longbench's?")],
)
def test_records_of_another_kind(content, message, tmp_path):
    (tmp_path / "qasper.jsonl").write_text(content)
    task = tasks.get("longbench")(subset="qasper", data=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        task.sample(text(), next(task.units(text(), 300, [0])))


def test_without_datasets_it_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    task = tasks.get("longbench")(subset="lcc")
    with pytest.raises(ImportError, match=r"pip install 'lcpatch\[eval\]', or give its files with --data"):
        next(task.units(text(), 300, [0]))


@pytest.mark.parametrize(
    ("name", "subset", "asked"),
    [
        ("longbench", "musique", (("zai-org/LongBench", "musique"), "test")),
        ("longbench_v2", "short", (("zai-org/LongBench-v2",), "train")),
        ("infinitebench", "kv_retrieval", (("xinrongzhang2022/InfiniteBench",), "kv_retrieval")),
    ],
)
def test_what_is_asked_of_the_hub(name, subset, asked, monkeypatch):
    fake, calls = ModuleType("datasets"), []

    def load_dataset(*args, split):
        calls.append((args, split))
        return [{**V1, **V2}, {**V1, **V2, "length": "long"}]

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    units = list(tasks.get(name)(subset=subset).units(text(), 300, [0]))
    assert calls == [asked]
    assert len(units) == (1 if subset == "short" else 2)


@pytest.mark.parametrize(
    ("metric", "written", "answers", "score"),
    [
        ("f1", "The Randalls!", ["randalls"], 1),
        ("f1", "at Randalls", ["Randalls", "London"], 2 / 3),
        ("f1", "", ["Randalls"], 0),
        ("rouge_l", "a b c d", ["a x c d"], 0.75),
        ("rouge_l", "", ["a"], 0),
        ("first_number", "it is 12.0, or 13", ["12"], 1),
        ("first_number", "none", ["12"], 0),
        ("first_letter", " B. Because", ["B"], 1),
        ("first_letter", "Be C", ["B"], 0),
        ("first_line", "\n# x\nreturn x\nfoo", ["return x"], 1),
        ("any_of", "in RANDALLS", ["London", "Randalls"], 1),
    ],
)
def test_metrics_by_hand(metric, written, answers, score):
    assert METRICS[metric](written, Question("", tuple(answers))) == pytest.approx(score)
