"""Pushing and loading over HTTP: the real clients, each in a process of its own, against a Hub on loopback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_client import client
from hub_server import HubServer

PUSH = """
model = lcpatch.apply(build(), "s2", sinks="logit:0.5", **SHORT["s2"])
want = model(ids).logits.detach()

def push(name="me/model", model=model, **settings):
    return lcpatch.push_to_hub(model, name, **{"token": token, "private": True, **settings})

said["plan"] = list(push(dry_run=True).files)
said["no token"] = error(lambda: push(token=False))
said["bad token"] = error(lambda: push(token="hf_wrong"))
said["foreign"] = error(lambda: push("you/model"))
for status in (409, 429, 500, 0):
    fail("/commit/", status)
    said[str(status)] = error(push)
    kept = pathlib.Path(said[str(status)].rpartition(" ")[2])
    said[f"kept {status}"] = torch.equal(lcpatch.from_pretrained(kept)(ids).logits, want)

said["commit"] = push().commit
other = lcpatch.apply(build(seed=1), "sink", **SHORT["sink"])
push(model=other, revision="dev")
said["pull request"] = push(model=other, create_pr=True).pull_request
torch.save([want, other(ids).logits.detach()], out + "/model.pt")

build().save_pretrained(out + "/base")
base = lcpatch.apply(AutoModelForCausalLM.from_pretrained(out + "/base"), "s2", **SHORT["s2"])
adapter = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
push("me/adapter", adapter)
torch.save(adapter(ids).logits.detach(), out + "/adapter.pt")
"""

PULL = """
want, other = torch.load(out + "/model.pt")
said["no token"] = error(lambda: lcpatch.from_pretrained("me/model"))
said["missing"] = error(lambda: lcpatch.from_pretrained("me/nothing", token=token))
said["revision"] = error(lambda: lcpatch.from_pretrained("me/model", token=token, revision="nothing"))
loaded = lcpatch.from_pretrained("me/model", token=token)
said["model"] = torch.equal(loaded(ids).logits, want)
said["name"] = loaded.name_or_path
said["cached"] = torch.equal(lcpatch.from_pretrained("me/model", local_files_only=True)(ids).logits, want)
dev = lcpatch.from_pretrained("me/model", token=token, revision="dev")
said["branch"] = torch.equal(dev(ids).logits, other)
adapter = lcpatch.from_pretrained("me/adapter", token=token)
said["adapter"] = torch.equal(adapter(ids).logits, torch.load(out + "/adapter.pt"))
lcpatch.register()
plain = AutoModelForCausalLM.from_pretrained("me/model", token=token, revision="dev")
said["plain"] = torch.equal(plain(ids).logits, other)
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict[str, Any]:
    """What a pusher and then a puller said, and the Hub's folder."""
    folder = tmp_path_factory.mktemp("story")
    with HubServer(folder / "hub") as hub:
        pushed = client(PUSH, hub, folder, "pusher")
        requests = list(hub.requests)
        pulled = client(PULL, hub, folder, "puller")
    return {"pushed": pushed, "pulled": pulled, "requests": requests, "folder": folder}


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
    assert creations == 11  # one for each push that was meant: 7 that failed, 4 that did not


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "401, the Hub does not know this token"),
        ("bad token", "401, the Hub does not know this token"),
        ("foreign", "403, this token may not do that"),
        ("409", "409, somebody else changed the repository"),
        ("429", "429, too many requests"),
        ("500", "500, the Hub has a fault"),
        ("0", "no answer from the Hub"),
    ],
)
def test_a_failed_push_says_why_and_keeps_the_files(case: str, message: str, story):
    said = story["pushed"][case]
    assert message in said
    assert "The saved files are whole in" in said
    assert story["pushed"].get(f"kept {case}", True)


@pytest.mark.parametrize("what", ["model", "cached", "branch", "adapter", "plain"])
def test_a_fresh_process_loads_equal_logits(what: str, story):
    assert story["pulled"][what]
    assert story["pulled"]["name"] == "me/model"


@pytest.mark.parametrize(("case", "status"), [("no token", 401), ("missing", 404), ("revision", 404)])
def test_what_cannot_be_loaded_is_said(case: str, status: int, story):
    assert f": {status}, " in story["pulled"][case]
