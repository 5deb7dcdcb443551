"""Cards: what they say, that nothing in them can be markup that is not ours, and that a hand-written one stays."""

import functools
import json
import math
import re
from pathlib import Path

import jinja2
import peft
import pytest
import yaml
from card_cases import TEXTS, kinds
from hypothesis import given, settings
from models import SHORT, build

import lcpatch
from lcpatch.cli import main
from lcpatch.eval.saved import read_report
from lcpatch.hf.models import unwrap
from lcpatch.hub import preview_card
from lcpatch.hub.about import About
from lcpatch.hub.card import Subject, card_text, make_card
from lcpatch.hub.card_files import is_ours, parts, signed, to_html, write_card
from lcpatch.hub.escape import clean
from lcpatch.hub.template import FOLDER, render

ARMS = ["dense", "s2(stride=3)"]


def row(task: str, arm: str, length: int, seed: int, **facts) -> dict:
    return {"task": task, "arm": arm, "length": length, "seed": seed, "key": f"{task}{arm}{length}{seed}", **facts}


@functools.cache
def report_text(label: str = ARMS[1]) -> str:
    """A report as `lcpatch eval` writes it, with numbers made up here."""
    rows = []
    for arm, extra in (("dense", 0.0), (label, 0.25)):
        for length in (256, 512):
            for seed in (0, 1):
                positions = [[0, 128, 3.0 + extra], [128, 256, 2.5 + extra]]
                loss = 2.0 + extra + 0.1 * seed
                rows.append(row("perplexity", arm, length, seed, nll=loss, bits_per_byte=loss / 2, positions=positions))
                for depth in (0.0, 1.0):
                    facts = {"depth": depth, "rank": float(arm == "dense"), "generate": 0.0, "chance": 0.1}
                    rows.append(row("needle", arm, length, seed, **facts))
    run = {"model": "tiny", "parameters": 12345, "dtype": "float32", "text": "a book", "text_tokens": 9000}
    made_with = {"lcpatch": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "device": "CPU, 2 threads"}
    return json.dumps({
        "schema": 1, "run": {**run, "text_hash": "abc", "chat": False}, "versions": made_with,
        "command": "lcpatch eval tiny --tasks perplexity,needle", "tasks": {"perplexity": {}, "needle": {"depths": 2}},
        "arms": ["dense", label], "rows": rows,
    })  # fmt: skip


def report(label: str = ARMS[1]) -> dict:
    return json.loads(report_text(label))


def subject(method: str = "s2", *, adapter: bool = False, **overrides) -> Subject:
    model = lcpatch.apply(build(num_hidden_layers=4), method, **{**SHORT[method], "layers": [0, 2], **overrides})
    config = unwrap(model).config
    facts = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"} if adapter else None
    patch = lcpatch.PatchConfig.from_dict(config.lcpatch)
    return Subject("me/model", patch, facts, {**config.to_dict(), "_name_or_path": "org/base"})


@functools.cache
def plain() -> Subject:
    return subject()


def head_of(card: str) -> dict:
    return yaml.safe_load(parts(card)[0])


# What it says


def test_it_says_what_changed_and_what_it_costs():
    about = About.of({"license": "apache-2.0", "datasets": ["org/data"], "training": {"steps": 10}})
    card, pictures = make_card(plain(), about, report())
    assert "2 of 4 attention layers (0, 2) follow `s2`" in card
    assert "https://arxiv.org/abs/2407.17678" in card
    assert 'lcpatch.from_pretrained("me/model")' in card
    assert 'attn_implementation="sdpa"' in card
    assert "| stride | `3` |" in card
    assert "Hardware: CPU, 2 threads" in card
    assert "Seeds: 0, 1" in card
    assert "lcpatch eval tiny --tasks perplexity,needle" in card
    assert f"| 512 | perplexity | {math.exp(2.05):.2f} [" in card
    assert f"{math.exp(2.3):.2f} [" in card
    assert "| 512 | ranked (chance 10%) | 100% [100%, 100%] | 0% [0%, 0%] | -100% [-100%, -100%] |" in card
    assert "@misc{lin2024s2," in card
    assert "| steps | 10 |" in card
    assert set(pictures) == {"card/pattern.png", "card/perplexity.png", "card/needle.png"}
    for name in pictures:
        assert f"]({name})" in card


def test_it_does_not_say_where_the_measured_model_lay():
    found = report()
    for name, said in (("/srv/runs/tiny", "tiny"), ("org/tiny", "org/tiny")):
        found["run"]["model"] = name
        assert f"- Model: {said}, 0.0M parameters" in make_card(plain(), About(), found)[0]


def test_its_metadata_is_what_the_hub_reads():
    from huggingface_hub import ModelCard

    about = About.of({"license": "mit", "language": "en", "tags": ["novels"], "datasets": "org/data"})
    card = card_text(plain(), about, read_report(report()))
    data = ModelCard(card).data
    assert data.license == "mit"
    assert data.language == ["en"]
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["lcpatch", "s2", "long-context", "sparse-attention", "novels"]
    assert data.datasets == ["org/data"]
    assert {r.metric_type for r in data.eval_results} == {"perplexity", "bits_per_byte", "accuracy"}
    assert not any("dense" in r.metric_name for r in data.eval_results)
    values = [r.metric_value for r in data.eval_results if r.metric_type == "perplexity"]
    assert values == pytest.approx([math.exp(2.3)] * 2)


@pytest.mark.parametrize("method", lcpatch.methods())
@pytest.mark.parametrize("adapter", [False, True])
def test_every_method_has_a_card(method: str, adapter: bool):
    card = card_text(subject(method, adapter=adapter), About())
    always = lcpatch.methods()[method].default_mode == "always"
    assert ("and in inference" in card) == always
    assert ("It runs without lcpatch too" in card) != always
    assert head_of(card)["library_name"] == ("peft" if adapter else "transformers")
    assert head_of(card)["base_model_relation"] == ("adapter" if adapter else "finetune")
    assert ("in silence" in card) == (adapter and always)
    assert "Nothing was measured" in card
    assert "None was stated" in card


def test_the_positions_of_an_adapter_are_said(tmp_path: Path):
    model = lcpatch.apply(build(max_position_embeddings=777), "sf", **SHORT["sf"])
    lcpatch.save_pretrained(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")), tmp_path)
    card = card_text(Subject.of(tmp_path, "me/adapter"), About())
    assert "if the base has the positions below" in card
    assert "`777`" in card


def test_learned_sinks_and_switched_off_patches_are_said():
    card = card_text(subject("s2", sinks="logit:0.5"), About())
    assert "learned sink logit" in card
    assert "After `lcpatch.register()`" not in card
    card = card_text(subject("s2", sinks="prefix:3"), About())
    assert "learned prefix sinks (3)" in card
    assert "only `lcpatch.from_pretrained` reads" in card
    assert "After `lcpatch.register()`" not in card
    card = card_text(subject("s2", mode="never"), About())
    assert "switched off" in card


def test_a_report_without_the_unpatched_model_says_so():
    data = report()
    data["arms"] = ARMS[1:]
    data["rows"] = [r for r in data["rows"] if r["arm"] != "dense"]
    card = card_text(plain(), About(), read_report(data))
    assert "was **not** among them" in card


def test_an_undefined_variable_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("model", metadata="", name="x")
    assert {"model.md.jinja", "adapter.md.jinja"} <= {f.name for f in FOLDER.iterdir()}


# Untrusted text


@given(TEXTS, TEXTS, TEXTS, TEXTS)
@settings(max_examples=60)
def test_no_text_is_markup(key: str, value: str, limit: str, tag: str):
    def card(key: str, value: str, limit: str, tag: str) -> str:
        about = {"training": {key: value, "text": "t"}, "limits": [limit], "tags": [tag]}
        return card_text(plain(), About.of(about))

    made = card(key, value, limit, tag)
    assert kinds(made) == kinds(card("x", "x", "x", "x"))
    head = head_of(made)
    assert head["tags"][4:] in ([clean(tag)], [])
    assert head.keys() == head_of(card("x", "x", "x", "x")).keys()
    html = to_html(made, value)
    assert "<script>alert" not in html
    assert "<img" not in html


@given(TEXTS.filter(lambda text: clean(text) not in ("", "dense")), TEXTS)
@settings(max_examples=20)
def test_no_text_of_a_report_is_markup(label: str, name: str):
    def card(label: str, name: str) -> str:
        data = report(label)
        data["run"] |= {"model": name, "text": name}
        data["versions"] |= {"device": name}
        data["command"] = f"x {name}"
        data["tasks"]["needle"]["file"] = name
        return card_text(plain(), About(), read_report(data), ["card/needle.png"])

    assert kinds(card(label, name)) == kinds(card("x", "x"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"licence": "mit"}, "a card knows nothing of 'licence'"),
        ({"license": "my own\nwords"}, "license="),
        ({"base_model": "../secrets"}, "base_model="),
        ({"base_model_relation": "cousin"}, "is not one of adapter"),
        ({"datasets": [1]}, "must be a list of strings"),
        ({"training": 3}, "must be a text or a mapping"),
    ],
)
def test_what_does_not_fit_is_refused(about: dict, message: str):
    with pytest.raises(ValueError, match=message):
        About.of(about)


# On disk


def test_a_card_that_somebody_wrote_stays(tmp_path: Path):
    card = card_text(plain(), About())
    write_card(tmp_path, card, {})
    text = (tmp_path / "README.md").read_text()
    assert is_ours(text)
    assert is_ours(text.replace("\n", "\r\n"))
    write_card(tmp_path, card + "more\n", {})  # ours: replaced
    assert not is_ours(text.replace("patched", "improved"))
    for theirs in ("# Mine\n", text + "\nA word of mine.\n", text.replace("patched", "improved")):
        (tmp_path / "README.md").write_text(theirs)
        with pytest.raises(ValueError, match="by hand, and stays"):
            write_card(tmp_path, card, {})
        assert (tmp_path / "README.md").read_text() == theirs


def test_the_command_previews_it(tmp_path: Path, capsys):
    lcpatch.save_pretrained(lcpatch.apply(build(), "sf", **SHORT["sf"]), tmp_path / "model sf")
    (tmp_path / "report.json").write_text(report_text())
    (tmp_path / "about.yaml").write_text("license: mit\nlimits: [English only]\n")
    given = ["--report", str(tmp_path), "--about", str(tmp_path / "about.yaml"), "--out", str(tmp_path / "out")]
    assert main(["card", str(tmp_path / "model sf"), *given]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert is_ours(card)
    assert "# me/model-sf" in card
    assert "- English only" in card
    page = (tmp_path / "out" / "preview.html").read_text()
    assert "<h1>me/model-sf</h1>" in page
    for name in re.findall(r'src="([^"]+)"', page):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert main(["card", str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_preview_needs_a_patch(tmp_path: Path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries no patch"):
        preview_card(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_signature_is_of_the_whole_text():
    assert is_ours(signed("x\n"))
    assert not is_ours("y" + signed("x\n"))
