"""Caches and custom_generate on the loopback Hub: pushed by one process, continued to the bit by another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_cases import ALL, make_model
from card_cases import TEXTS, kinds
from hub_client import client
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, tokens

import lcpatch
from lcpatch.cli import main
from lcpatch.hub import export_generate
from lcpatch.hub.about import About
from lcpatch.hub.cache import CACHE_FILE, cache_card
from lcpatch.hub.card_files import is_ours
from lcpatch.hub.generate import _source

PUSH = """
from lcpatch.hub import push_generate
build().push_to_hub("me/base", token=token)
base = AutoModelForCausalLM.from_pretrained("me/base")
patched = lcpatch.apply(build(), "s2", **SHORT["s2"])
lcpatch.push_to_hub(patched, "me/model", token=token)
patched = lcpatch.from_pretrained("me/model")
want = {}
for name, model, cache in (
    ("book", base, lcpatch.H2OCache(base, budget=24, num_sinks=2)), ("sparse", patched, lcpatch.S2Cache(patched)),
):
    model(ids[:, :60], past_key_values=cache)
    pushed = lcpatch.push_to_hub(cache, "me/" + name, token=token, private=True, about={"license": "mit"})
    said["files of " + name] = sorted(pushed.files)
    want[name] = model(ids[:, 60:], past_key_values=cache).logits.detach()
again = lcpatch.H2OCache(base, budget=24)
base(ids[:, :60], past_key_values=again)
fail("/_lfs/", 0, times=99)
said["cut"] = error(lambda: lcpatch.push_to_hub(again, "me/book", token=token))
clear()
kept = said["cut"].rpartition(" ")[2]
said["kept"] = lcpatch.load_cache(kept, base).get_seq_length()

settings = {"max_new_tokens": 12, "do_sample": False}
want["generated"] = base.generate(ids, past_key_values=lcpatch.H2OCache(base, budget=20, num_sinks=2), **settings)
want["dense"] = build().generate(ids, **settings)
push_generate("h2o", "me/h2o", token=token, budget=20, num_sinks=2)

from lcpatch.caches.scorers import Bookmarks
scorer = Bookmarks.of(base)
for parameter in scorer.parameters():
    torch.nn.init.normal_(parameter)
lcpatch.push_to_hub(scorer, "me/scorer", token=token, about={"base_model": "me/base"})

def read(cache, model):
    model(ids[:, :60], past_key_values=cache)
    return model(ids[:, 60:61], past_key_values=cache).logits.detach()

small = {"budget": 16, "page": 4, "recent": 4, "num_sinks": 0}
want["scorer"] = read(lcpatch.RetrievalCache(base, scorer=scorer, **small), base)
want["mean"] = read(lcpatch.RetrievalCache(base, scorer="mean", **small), base)
torch.save(want, out + "/want.pt")
"""

PULL = """
want = torch.load(out + "/want.pt")
said["no token"] = error(lambda: lcpatch.load_cache("me/book", build()))
for name in ("book", "sparse"):
    made = run_card("me/" + name, 0, "cache", "model")
    logits = made[1](ids[:, 60:], past_key_values=made[0]).logits
    said[name] = torch.equal(logits, want[name])
base = AutoModelForCausalLM.from_pretrained("me/base")
try:
    lcpatch.load_cache("me/book", build(seed=1), token=token)
except lcpatch.StoreError as refused:
    said["other model"] = str(refused)
settings = {"max_new_tokens": 12, "do_sample": False, "custom_generate": "me/h2o"}
try:
    base.generate(ids, **settings, trust_remote_code=False)
except ValueError as refused:
    said["untrusted"] = str(refused)
got = base.generate(ids, **settings, trust_remote_code=True)
said["generated"] = torch.equal(got, want["generated"])
said["apart"] = not torch.equal(got, want["dense"])
wide = base.generate(ids, **settings, trust_remote_code=True, cache_options={"budget": 500})
said["options"] = torch.equal(wide, want["dense"])

from lcpatch.hub import load_scorer
made = run_card("me/scorer", 0, "model", "cache")
said["scorer card"] = type(made[1]).__name__
scorer = load_scorer("me/scorer", base)

def read(cache, model):
    model(ids[:, :60], past_key_values=cache)
    return model(ids[:, 60:61], past_key_values=cache).logits.detach()

small = {"budget": 16, "page": 4, "recent": 4, "num_sinks": 0}
got = read(lcpatch.RetrievalCache(base, scorer=scorer, **small), base)
said["scorer"] = torch.equal(got, want["scorer"]) and not torch.equal(got, want["mean"])
try:
    load_scorer("me/scorer", build(num_hidden_layers=3))
except ValueError as refused:
    said["other geometry"] = str(refused)
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("caches")
    with HubServer(folder / "hub") as hub:
        pushed = client(PUSH, hub, folder, "pusher")
        pulled = client(PULL, hub, folder, "puller")
    return {"pushed": pushed, "pulled": pulled}


def test_a_cache_is_pushed_with_its_card(story):
    assert story["pushed"]["files of book"] == ["README.md", CACHE_FILE]
    assert story["pushed"]["files of sparse"] == ["README.md", CACHE_FILE]


@pytest.mark.parametrize("name", ["book", "sparse"])
def test_the_code_of_its_card_continues_it_to_the_bit(name: str, story):
    assert story["pulled"][name]


def test_failures_are_said_and_nothing_is_lost(story):
    assert "no answer from the Hub" in story["pushed"]["cut"]
    assert story["pushed"]["kept"] == 60
    assert "401, the Hub does not know this token" in story["pulled"]["no token"]
    assert "other weights" in story["pulled"]["other model"]


def test_generate_takes_the_cache_from_a_repository(story):
    said = story["pulled"]
    assert "trust_remote_code" in said["untrusted"]
    assert said["generated"]
    assert said["apart"]
    assert said["options"]


def test_a_scorer_travels_too(story):
    assert story["pulled"]["scorer card"] == "RetrievalCache"
    assert story["pulled"]["scorer"]
    assert "this model has (3, " in story["pulled"]["other geometry"]


# Without a Hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model = build()
    cache = lcpatch.H2OCache(model, budget=24)
    model(tokens(), past_key_values=cache)
    return cache.save(tmp_path_factory.mktemp("cache") / CACHE_FILE)


def test_a_folder_or_a_file_is_as_good(saved: Path):
    for where in (saved, saved.parent, str(saved)):
        assert lcpatch.load_cache(where, build()).get_seq_length() == tokens().shape[1]
    with pytest.raises(lcpatch.StoreError, match="no such file"):
        lcpatch.load_cache("nothing.safetensors", build())


def test_the_command_pushes_a_file_and_exports_a_generate(saved: Path, tmp_path: Path, capsys):
    assert main(["push", str(saved), "me/book", "--dry-run"]) == 0
    assert CACHE_FILE in capsys.readouterr().out
    assert main(["push", "h2o", "me/h2o", "--dry-run", "--budget", "30"]) == 0
    assert "custom_generate/generate.py" in capsys.readouterr().out
    assert main(["push", "h2o", "me/h2o", "--out", str(tmp_path), "--budget", ".1"]) == 0
    code = (tmp_path / "custom_generate" / "generate.py").read_text()
    assert "OPTIONS = {'budget': 0.1}" in code
    assert (tmp_path / "custom_generate" / "requirements.txt").read_text() == f"lcpatch>={lcpatch.__version__}\n"
    card = (tmp_path / "README.md").read_text()
    assert is_ours(card)
    assert "| budget | `0.1` |" in card
    assert main(["push", "h3o", "me/h2o", "--dry-run"]) == 2
    assert "unknown cache 'h3o'" in capsys.readouterr().err
    assert main(["push", "h2o", "me/h2o", "--dry-run", "--bugdet", "30"]) == 2
    assert "no option 'bugdet'" in capsys.readouterr().err
    assert main(["push", "h2o", "me/h2o", "--dry-run", "--budget", "1.5"]) == 2
    assert "budget=1.5 must be tokens per KV head" in capsys.readouterr().err
    assert main(["push", str(saved), "me/book", "--dry-run", "--budget", "30"]) == 2
    assert "is an option of a cache" in capsys.readouterr().err


def test_options_are_values_not_code():
    text = "'); import os; ('"
    made: dict[str, Any] = {}
    exec(_source(lcpatch.H2OCache, {"score": text}), made)
    assert made["OPTIONS"] == {"score": text}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h2o", {"score": ["sum"]}, "must be a plain value"),
        ("h2o", {"budget": 1.5}, r"budget=1.5 must be tokens per KV head .* or a share"),
        ("h2o", {"score": "summ"}, "score='summ' is not one of 'sum', 'mean', 'decay'"),
        ("h2o", {"codec": "int4", "compiled": True}, "which codec='int4' does not allow"),
        ("sink", {"positions": "rollng"}, "positions='rollng' is not one of"),
        ("cluster", {"log_size": 1}, "log_size=1 must be True or False"),
        ("retrieval", {"codec": "int8"}, "give offload=True, or leave codec out"),
        ("retrieval", {"scorer": "quset"}, "Did you mean 'quest'"),
        ("tiered", {"attend": 8}, "attend=8 must hold"),
        ("tiered", {"disk": "/scratch"}, "for whoever generates to choose.*cache_options={'disk': …}"),
    ],
)
def test_what_the_cache_refuses_is_not_exported(name: str, options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        export_generate(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_check_leaves_random_numbers_alone(tmp_path: Path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    export_generate("h2o", tmp_path, budget=0.3)
    assert torch.equal(torch.rand(3), want)


OPTIONS: dict[str, dict[str, Any]] = {
    "sink": {"positions": "rolling", "num_sinks": 2, "codec": "int4"},
    "retrieval": {"budget": 48, "page": 4, "recent": 4, "scorer": "quest", "offload": True, "codec": "int8"},
    "tiered": {"budget": 48, "page": 4, "recent": 4, "codec": "int4"},
}


@pytest.mark.parametrize("name", ALL)
def test_every_cache_has_a_generate(name: str, tmp_path: Path):
    model = make_model(name)
    export_generate(name, tmp_path, **OPTIONS.get(name, {}))
    made: dict[str, Any] = {}
    exec((tmp_path / "custom_generate" / "generate.py").read_text(), made)
    out = made["generate"](model, input_ids=tokens(), max_new_tokens=3, do_sample=False)
    assert out.shape[1] == tokens().shape[1] + 3
    model.generate = lambda *args, **kwargs: made["generate"](model, *args, **kwargs)  # as transformers sets it
    assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False), out)


VALUES = st.none() | st.booleans() | st.integers() | TEXTS | st.lists(st.integers(), max_size=2)
KEYS = st.sampled_from(["name", "dtype", "patch", "class"])


@given(KEYS, VALUES, VALUES, TEXTS)
@settings(max_examples=60)
def test_a_cards_header_may_say_anything(key: str, value: Any, other: Any, text: str):
    def card(key: str, value: Any, other: Any, text: str) -> str:
        model = {"name": "org/base", "dtype": "float32", "patch": None, key: value}
        header = {"cache": "h2o", "options": {text: text}, "model": model, "layers": [other, {"numbers": other}]}
        return cache_card({**header, "versions": {text: text}, "tokenizer": None}, "me/book", About())

    made = card(key, value, other, text)
    base = model_name = value if key == "name" else "org/base"
    if model_name != "org/base":  # with a base there is a link
        base = "org/base" if f"](https://huggingface.co/{value})" in made else None
    assert kinds(made) == kinds(card("name", base, None, "x"))
    json.dumps(made)
