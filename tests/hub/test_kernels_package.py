"""Hugging Face's `kernels` package and transformers load what we export, from a folder and from the loopback Hub."""

from pathlib import Path
from typing import Any

import pytest
from hub_client import client
from hub_server import HubServer
from transformers.utils import is_kernels_available

from lcpatch.hub.kernels import Project

if not is_kernels_available():
    pytest.skip("needs transformers and kernels in versions that fit: make test-kernels", allow_module_level=True)

FOLDER = Path(__file__).parents[2] / "kernels"

PUSH = """
from lcpatch.hub.kernels import export_kernels, push_kernels
export_kernels(out + "/kernel", repo_id="me/kernel")
said["commit"] = push_kernels("me/kernel", token=token).commit
said["again"] = push_kernels("me/kernel", token=token).commit
fail("/api/kernels/me/kernel/commit", 500)
said["fault"] = error(lambda: push_kernels("me/kernel", token=token))

want = {}
for method in ("s2", "sf"):
    model = lcpatch.apply(build(), method, **SHORT[method], mode="always")
    lcpatch.save_pretrained(model, out + "/" + method)
    like, exact = model(ids).logits.detach(), model.double()(ids).logits.detach()
    budget = 2 * (like - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    want[method] = (exact, budget)  # what float32 costs decides what may differ
lcpatch.push_to_hub(lcpatch.apply(build(), "s2", **SHORT["s2"]), "me/model", token=token)
torch.save(want, out + "/want.pt")
"""

PULL = """
import warnings
from kernels import get_kernel, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata
import kernels
want, dense = torch.load(out + "/want.pt"), build()(ids).logits
budget = want["s2"][1]
folder = pathlib.Path(out, "kernel")

local = get_local_kernel(folder)
said["local"] = local.__all__
variant = folder / "build" / "torch-cpu"
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
try:
    get_kernel("me/kernel", version=1)
except ValueError as refused:
    said["untrusted"] = str(refused)
hub = get_kernel("me/kernel", version=1, trust_remote_code=True)
said["hub"] = hub.__name__ == local.__name__

def load(name, **settings):
    return AutoModelForCausalLM.from_pretrained(name, attn_implementation="me/kernel", **settings).eval()

def close(logits, method):
    exact, budget = want[method]
    return bool((logits - exact).abs().max() <= budget)

remote = load("me/model", allow_all_kernels=True)
said["from the Hub"] = close(remote(ids).logits, "s2")
said["saved"] = close(load(out + "/sf", allow_all_kernels=True)(ids).logits, "sf")
said["apart"] = min(float((exact - dense).abs().max() / budget) for exact, budget in want.values())
said["generates"] = remote.generate(ids, max_new_tokens=5, do_sample=False).shape[1] - ids.shape[1]
build().save_pretrained(out + "/plain")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plain = load(out + "/plain", allow_all_kernels=True)
    said["plain"] = bool((plain(ids).logits - dense).abs().max() <= budget)
    plain(ids)
said["warned"] = [str(w.message) for w in caught if "carries no specs" in str(w.message)]
said["lcpatch"] = "lcpatch" in sys.modules and sys.modules["lcpatch"] is not None
"""

LOCAL = """
os.environ["LOCAL_KERNELS"] = "me/elsewhere=" + out + "/kernel"
model = AutoModelForCausalLM.from_pretrained(out + "/s2", attn_implementation="me/elsewhere").eval()
exact, budget = torch.load(out + "/want.pt")["s2"]
said["local"] = bool((model(ids).logits - exact).abs().max() <= budget)
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    with HubServer(folder / "hub") as hub:
        pushed = client(PUSH, hub, folder, "pusher")
        pulled = client(PULL, hub, folder, "puller", lcpatch=False)
        local = client(LOCAL, hub, folder, "local", lcpatch=False)
    return {"pushed": pushed, "pulled": pulled, "local": local}


def test_the_project_is_valid():
    from kernels._rust import Build

    general = Build.open(FOLDER).general
    assert {str(backend).lower() for backend in general.backends} == set(Project.read(FOLDER).backends)


def test_a_push_is_a_commit_on_the_versions_branch(story):
    assert story["pushed"]["commit"] != story["pushed"]["again"]
    assert "500, the Hub has a fault" in story["pushed"]["fault"]


def test_it_loads_from_a_folder_and_from_the_hub(story):
    assert "block_sparse" in story["pulled"]["local"]
    assert "trust_remote_code" in story["pulled"]["untrusted"]
    assert story["pulled"]["hub"]


def test_a_model_runs_sparse_without_lcpatch(story):
    """By the integers in its config, through transformers alone."""
    said = story["pulled"]
    assert not said["lcpatch"]
    assert said["apart"] > 100
    assert said["from the Hub"]
    assert said["saved"]
    assert said["generates"] == 5
    assert story["local"]["local"]


def test_a_model_without_integers_is_causal_and_says_so_once(story):
    assert story["pulled"]["plain"]
    assert len(story["pulled"]["warned"]) == 1
