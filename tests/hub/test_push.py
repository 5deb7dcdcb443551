"""Pushing and loading over HTTP: the real clients, each in a process of its own, against a Hub on loopback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_client import client
from hub_server import HubServer
from models import build

import lcpatch

PUSH = """
from huggingface_hub import HfApi
model = lcpatch.apply(build(), "s2", sinks="logit:0.5", **SHORT["s2"])
want = model(ids).logits.detach()
said["pushes"] = 0

def push(name="me/model", model=model, **settings):
    said["pushes"] += not settings.get("dry_run", False)
    return lcpatch.push_to_hub(model, name, **{"token": token, "private": True, **settings})

said["plan"] = list(push(dry_run=True).files)
said["no token"] = error(lambda: push(token=False))
said["bad token"] = error(lambda: push(token="hf_wrong"))
said["foreign"] = error(lambda: push("you/model"))
lfs, commit = "/_lfs/", "/commit/"
FAULTS = {
    "409": (commit, 409, 1), "429": (commit, 429, 1), "500": (commit, 500, 1), "cut": (commit, 0, 1),
    "upload cut": (lfs, 0, 99), "upload 500": (lfs, 500, 99), "upload 403": (lfs, 403, 1),
    "card": ("/validate-yaml", 400, 1),
}
for name, (path, status, times) in FAULTS.items():
    fail(path, status, times=times, retry_after=7 if status == 429 else None)
    said[name] = error(push)
    clear()
    kept = pathlib.Path(said[name].rpartition(" ")[2])
    said[f"kept {name}"] = torch.equal(lcpatch.from_pretrained(kept)(ids).logits, want)

fail(lfs, 0)  # cut once: the client itself tries again
fail(commit, -1)  # slow
said["commit"] = push().commit
clear()
other = lcpatch.apply(build(seed=1), "sink", **SHORT["sink"])
push(model=other, revision="dev")
said["pull request"] = push(model=other, create_pr=True).pull_request

build().push_to_hub("me/base", token=token, private=True)
base = lcpatch.apply(AutoModelForCausalLM.from_pretrained("me/base", token=token), "s2", **SHORT["s2"])
settings = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
adapter = peft.get_peft_model(base, settings).eval()
push("me/adapter", adapter)
adapted = adapter(ids).logits
named = peft.get_peft_model(adapter.unload(), settings, adapter_name="novels").eval()
push("me/named", named)

trained = peft.get_peft_model(lcpatch.apply(build(), "sf", **SHORT["sf"]), settings).eval().merge_and_unload()
push("me/trained", trained, about={"license": "mit", "training": "Not at all."})

text = "# Mine, kept"
HfApi(token=token).upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/trained")
push("me/trained", trained)
results = (want, other(ids).logits, adapted, trained(ids).logits, named(ids).logits)
torch.save([logits.detach() for logits in results], out + "/want.pt")
"""

PULL = """
want, other, adapted, trained, named = torch.load(out + "/want.pt")
said["no token"] = error(lambda: lcpatch.from_pretrained("me/model"))
said["missing"] = error(lambda: lcpatch.from_pretrained("me/nothing", token=token))
said["revision"] = error(lambda: lcpatch.from_pretrained("me/model", token=token, revision="nothing"))
fail("/revision/", 500, times=99)
said["fault"] = error(lambda: lcpatch.from_pretrained("me/model", token=token))
clear()
fail("/config.json", 0, times=99)
said["cut"] = error(lambda: lcpatch.from_pretrained("me/model", token=token))
clear()
fail("/config.json", -1, times=1)  # slower than the client waits, once
loaded = lcpatch.from_pretrained("me/model", token=token)
clear()
said["model"] = torch.equal(loaded(ids).logits, want)
said["name"] = loaded.name_or_path
said["cached"] = torch.equal(lcpatch.from_pretrained("me/model", local_files_only=True)(ids).logits, want)
dev = lcpatch.from_pretrained("me/model", token=token, revision="dev")
said["branch"] = torch.equal(dev(ids).logits, other)
adapter = lcpatch.from_pretrained("me/adapter", token=token)
said["adapter"] = torch.equal(adapter(ids).logits, adapted)
lcpatch.register()
plain = AutoModelForCausalLM.from_pretrained("me/model", token=token, revision="dev")
said["plain"] = torch.equal(plain(ids).logits, other)
merged = lcpatch.from_pretrained("me/trained", token=token)
said["merged"] = torch.equal(merged(ids).logits, trained)

for name, logits in (("me/model", want), ("me/adapter", adapted), ("me/named", named)):
    said[f"card of {name}"] = torch.equal(run_card(name, 0)(ids).logits, logits)
"""

STRANGER = """
want, other, adapted, trained, named = torch.load(out + "/want.pt")
dense = build()(ids).logits
said["model, dense"] = torch.equal(run_card("me/model", 1)(ids).logits, dense)
said["adapter, dense"] = not torch.equal(run_card("me/adapter", 1)(ids).logits, adapted)
said["named, dense"] = not torch.equal(run_card("me/named", 1)(ids).logits, named)
merged = AutoModelForCausalLM.from_pretrained("me/trained", token=token)
said["merged"] = torch.equal(merged(ids).logits, trained)
said["lcpatch"] = "lcpatch" in sys.modules and sys.modules["lcpatch"] is not None
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict[str, Any]:
    """What a pusher and then a puller said, and the Hub's folder."""
    folder = tmp_path_factory.mktemp("story")
    with HubServer(folder / "hub") as hub:
        pushed = client(PUSH, hub, folder, "pusher")
        requests = list(hub.requests)
        pulled = client(PULL, hub, folder, "puller")
        stranger = client(STRANGER, hub, folder, "stranger", lcpatch=False)
    said = {"pushed": pushed, "pulled": pulled, "stranger": stranger}
    return {**said, "requests": requests, "folder": folder}


def files_of(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_a_push_is_one_commit_of_safe_files(story):
    names = {
        "README.md",
        "card/pattern.png",
        "config.json",
        "generation_config.json",
        "lcpatch.safetensors",
        "lcpatch_config.json",
        "model.safetensors",
    }
    assert set(story["pushed"]["plan"]) == names
    repo = story["folder"] / "hub" / "me" / "model"
    state = json.loads((repo / "repo.json").read_text())
    assert len(state["log"]) == 4  # the empty start, one to main, one to the branch, one pull request
    assert state["private"]
    assert state["branches"]["main"] == story["pushed"]["commit"]
    assert files_of(repo / state["branches"]["main"]) == names
    assert "lcpatch.safetensors" not in files_of(repo / state["branches"]["dev"])
    assert story["pushed"]["pull request"].endswith("/discussions/1")
    card = (repo / state["branches"]["main"] / "README.md").read_text()
    assert 'lcpatch.from_pretrained("me/model")' in card


def test_a_dry_run_talks_to_nobody(story):
    creations = story["requests"].count("POST /api/repos/create")
    assert creations == story["pushed"]["pushes"] + 1  # and transformers' own push of the base


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "401, the Hub does not know this token"),
        ("bad token", "401, the Hub does not know this token"),
        ("foreign", "403, this token may not do that"),
        ("409", "409, somebody else changed the repository"),
        ("429", "429, too many requests: wait 7 s and try again"),
        ("500", "500, the Hub has a fault"),
        ("cut", "no answer from the Hub"),
        ("upload cut", "no answer from the Hub"),
        ("upload 500", "500, the Hub has a fault"),
        ("upload 403", "403, this token may not do that"),
        ("card", "Invalid metadata in README.md"),
    ],
)
def test_a_failed_push_says_why_and_keeps_the_files(case: str, message: str, story):
    said = story["pushed"][case]
    assert message in said
    assert "The saved files are whole in" in said
    assert story["pushed"].get(f"kept {case}", True)


@pytest.mark.parametrize("flag", ["private", "create_pr", "dry_run"])
def test_a_word_is_no_yes(flag: str):
    """Or the text "false" would be True, and what is published stays."""
    with pytest.raises(ValueError, match=f"^{flag}='false' must be True or False$"):
        lcpatch.push_to_hub(lcpatch.apply(build(), "s2"), "me/model", **{flag: "false"})


@pytest.mark.parametrize("what", ["model", "cached", "branch", "adapter", "plain", "merged"])
def test_a_fresh_process_loads_equal_logits(what: str, story):
    assert story["pulled"][what]
    assert story["pulled"]["name"] == "me/model"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", ": 401, "),
        ("missing", ": 404, "),
        ("revision", ": 404, "),
        ("fault", "the Hub cannot be reached"),
        ("cut", "cannot load me/model: "),
    ],
)
def test_what_cannot_be_loaded_is_said(case: str, message: str, story):
    assert message in story["pulled"][case]


@pytest.mark.parametrize("name", ["me/model", "me/adapter", "me/named"])
def test_the_code_of_a_card_runs(name: str, story):
    assert story["pulled"][f"card of {name}"]


def test_who_has_no_lcpatch_is_told_right(story):
    """What the cards say of a life without lcpatch: dense if asked for, and a merged model as it was trained."""
    said = story["stranger"]
    assert said.pop("lcpatch") is False
    assert said
    assert all(said.values())


def test_a_readme_of_ones_own_stays(story):
    repo = story["folder"] / "hub" / "me" / "trained"
    log = json.loads((repo / "repo.json").read_text())["log"]
    assert "Not at all." in (repo / log[1] / "README.md").read_text()
    for commit in log[2:]:
        assert (repo / commit / "README.md").read_text() == "# Mine, kept"
        assert files_of(repo / commit) == files_of(repo / log[1])
