"""The model that a verb is given by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(name: str, dtype: str | None) -> tuple[Any, Any]:
    """A model in eval mode on the GPU if there is one, and its tokenizer.

    Args:
        name: a folder, an id on the Hub, or "demo".
        dtype: as transformers names them; None: as the model was saved.

    Raises:
        FileNotFoundError: a folder that is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..hf.demo_model import demo_model

    place = Path(name).expanduser()
    of_model = any((place / config).is_file() for config in ("config.json", "adapter_config.json"))
    if not of_model and (place.is_dir() or name.startswith((".", "/", "~"))) and name != "demo":
        raise FileNotFoundError(f"{name} is no folder with a model in it: it has no config.json")
    logging.disable_progress_bar()
    folder = demo_model() if name == "demo" else place if name.startswith("~") else name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
