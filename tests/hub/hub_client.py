"""A client of the loopback Hub: a process of its own, with the real libraries and nothing cached."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[2]

PREPARE = """
import json, os, re, time, urllib.request, pathlib, torch
from huggingface_hub import constants, hf_hub_download
from transformers import AutoModelForCausalLM
from models import SHORT, build, tokens

said, ids = {}, tokens()
time.sleep = lambda seconds: None  # the clients wait between two tries

def order(path, data):
    urllib.request.urlopen(constants.ENDPOINT + path, data=json.dumps(data).encode()).read()

def fail(path, status, **more):
    order("/_test/fail", {"path": path, "status": status, **more})

def clear():
    order("/_test/clear", {})

def run_card(name, number, *wanted):
    "Run a card's Python block; gives the model that it makes, or what is wanted."
    os.environ["HF_TOKEN"] = token
    card = pathlib.Path(hf_hub_download(name, "README.md")).read_text()
    block = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)[number]
    made = {}
    exec(block, made)
    del os.environ["HF_TOKEN"]
    made["model"].eval()
    return [made[one] for one in wanted] if wanted else made["model"]
"""

WITH_LCPATCH = """
import peft, lcpatch

def error(call):
    try:
        call()
    except lcpatch.HubError as refused:
        return str(refused)
"""


def client(code: str, hub: HubServer, folder: Path, name: str, lcpatch: bool = True) -> dict[str, Any]:
    """Run `code` in a fresh process that knows only this Hub and has an empty cache; return what it `said`."""
    prepare = PREPARE + (WITH_LCPATCH if lcpatch else "import sys\nsys.modules['lcpatch'] = None  # not to be found\n")
    path = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests")]
    start = f"import sys; sys.path[:0] = {path!r}\ntoken, out = {TOKEN!r}, {str(folder)!r}\n"
    left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in left_out and not k.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / name),
        "TMPDIR": str(folder),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1"}  # weights go by plain LFS, which the server knows
    done = subprocess.run(
        [sys.executable, "-c", start + prepare + code + "\nprint(json.dumps(said))"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
