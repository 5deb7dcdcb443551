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
import json, urllib.request, pathlib, torch, peft, lcpatch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM
from models import SHORT, build, tokens

said, ids = {}, tokens()

def fail(path, status):
    data = json.dumps({"path": path, "status": status}).encode()
    urllib.request.urlopen(constants.ENDPOINT + "/_test/fail", data=data).read()

def error(call):
    try:
        call()
    except lcpatch.HubError as refused:
        return str(refused)
"""


def client(code: str, hub: HubServer, folder: Path, name: str) -> dict[str, Any]:
    """Run `code` in a fresh process that knows only this Hub and has an empty cache; return what it `said`."""
    path = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests")]
    start = f"import sys; sys.path[:0] = {path!r}\ntoken, out = {TOKEN!r}, {str(folder)!r}\n"
    left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in left_out and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / name), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", start + PREPARE + code + "\nprint(json.dumps(said))"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
