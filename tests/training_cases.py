"""A tiny model with a tokenizer on disk, and the settings that train it in a second."""

import os
import signal
from pathlib import Path
from typing import Any

import eval_cases
import models
import torch
from transformers import TrainerCallback

import lcpatch
from lcpatch.training.config import TrainConfig
from lcpatch.training.run import Result, train

LENGTH = 96
STEPS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "sinklora": {"attention": "sf", "sinks": "logit:-3"},
    "longlora": {"attention": "shift"},
    "s2": {"attention": "s2", "layers": (1,), "options": {"block_size": 16, "local_blocks": 2, "stride": 3}},
    "chunkwise": {"attention": "full", "chunk_size": 40},
}
"""What each recipe trains, at sizes that are sparse at `LENGTH`."""


def base(folder: Path, tied: bool = True, **sizes: int) -> Path:
    """A random model, of 2 layers unless `sizes` says otherwise, and its tokenizer, saved."""
    settings = {"vocab_size": eval_cases.VOCAB, "tie_word_embeddings": tied, "initializer_range": 0.05, **sizes}
    models.build(**settings).save_pretrained(folder)
    tokenizer = eval_cases.tokenizer(special=True)
    tokenizer.save_pretrained(folder)
    return folder


def config(model: Path, output: Path, **settings: Any) -> TrainConfig:
    fast = {"steps": STEPS, "length": LENGTH, "learning_rate": 5e-3, "warmup": 0, "save_every": 8, "eval_rows": 2}
    return TrainConfig(**{"model": str(model), "output": str(output), **fast, **settings})


def run(model: Path, output: Path, **settings: Any) -> Result:
    return train(config(model, output, **settings), lcpatch.save_pretrained)


class Interrupt(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def ids(length: int = 100, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, eval_cases.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
