"""A study: every arm trained on the same budget and evaluated alike, so that what differs is the attention alone.

One row per arm and seed, appended when it is there: a study that is stopped goes on with the next arm. Each arm is
evaluated densely, under its pattern, and where asked with a cache; the model before training ("untuned": position
interpolation alone) may be one more arm. `recovery` then says which share of a gap an arm closes.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..hf.demo_model import REPOSITORY
from .arms import Arm
from .store import Store

if TYPE_CHECKING:
    from ..training.config import TrainConfig

UNTUNED, FULL, SHORT = "untuned", "full", "short"


@dataclass(frozen=True)
class Study:
    """What is trained, and how it is judged.

    Args:
        config: of every run; its attention, options, layers, seed and output are each arm's own.
        arms: settings of `config` by the arm's name; "untuned" is the model before training, and takes none.
        seeds: training runs of each arm.
        text: files to evaluate on.
        lengths: contexts to evaluate at, in tokens.
        windows: of perplexity at each length.
        passkey_seeds: pass keys at each depth; 0: none.
        cache: a cache to evaluate the arms of `cached` with too.
        cache_options: of it.
        cache_chunk: tokens that are read at a time through it; it evicts between two reads.
        cached: names of arms.
    """

    config: TrainConfig
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0, 1, 2)
    text: Sequence[str] | None = None
    lengths: Sequence[int] = (16384, 32768)
    windows: int = 16
    passkey_seeds: int = 3
    cache: str | None = None
    cache_options: Mapping[str, Any] | None = None
    cache_chunk: int | None = None
    cached: Sequence[str] = ()

    def todo(self) -> list[tuple[str, int]]:
        """Every (arm, seed), a seed's arms together: a study that ends early has compared them on whole seeds."""
        trained = [arm for arm in self.arms if arm != UNTUNED]
        untuned = [(UNTUNED, self.seeds[0])] if UNTUNED in self.arms else []
        return [*untuned, *((arm, seed) for seed in self.seeds for arm in trained)]

    def asked(self) -> dict[str, Any]:
        """What `evaluate` is told of every run."""
        tasks = ["perplexity", *(["passkey"] if self.passkey_seeds else [])]
        told = {"text": self.text, "seeds": self.passkey_seeds or 1, "options": {"max_windows": self.windows}}
        return {"tasks": tasks, "lengths": self.lengths, **told}

    def config_of(self, arm: str, seed: int, folder: Path) -> TrainConfig:
        """The settings of one run."""
        own = {"attention": FULL, "seed": seed, "output": str(folder), "save_every": 0, "eval_rows": 0}
        return replace(self.config, **{**own, **self.arms[arm]})

    def header(self) -> dict[str, Any]:
        """What rows in one file must have in common."""
        fixed = self.config.to_dict()
        for name in ("attention", "options", "layers", "seed", "output"):
            fixed.pop(name)
        model = REPOSITORY if self.config.model == "demo" else self.config.model  # one model, however it was named
        fixed |= {"model": Path(model).name, "data": [Path(name).name for name in self.config.data]}
        judged = {
            "lengths": list(self.lengths),
            "windows": self.windows,
            "passkey_seeds": self.passkey_seeds,
            "cache": self.cache,
            "cache_options": dict(self.cache_options or {}),
            "cache_chunk": self.cache_chunk,
        }
        return {"training": fixed, **judged, "text": [Path(p).name for p in self.text or ()]}


def run(study: Study, out: Path, minutes: float = math.inf, say: Callable[[str], None] = print) -> Store:
    """Do what of `study` is not in `out` yet, and stop before `minutes` are over.

    Raises:
        ValueError: `out` holds another study; or an arm, a length or the text do not fit, before anything is trained.
    """
    _check(study, out)
    store = Store(out, study.header())
    start, longest = time.perf_counter(), 0.0
    for number, (arm, seed) in enumerate(todo := study.todo()):
        if f"{arm}/{seed}" in store.rows:
            continue
        left = 60 * minutes - (time.perf_counter() - start)
        if left <= 1.1 * longest:
            say(f"{len(todo) - number} of {len(todo)} runs are left; the same command goes on with {arm}, seed {seed}")
            break
        begin = time.perf_counter()
        store.add(f"{arm}/{seed}", _one(study, arm, seed, out / "run"))
        longest = max(longest, time.perf_counter() - begin)
        say(f"{arm}, seed {seed}: {describe(store.rows[f'{arm}/{seed}'])}")
    return store


def found_in(out: Path) -> Store:
    """The study in a folder, as far as it is; nothing is written.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something else than a study is.
    """
    store = Store.found_in(out)
    if not {"training", "lengths"} <= store.header.keys():
        raise ValueError(f"{out} holds results of `lcpatch eval`, not of a study: name a study's folder")
    return store


def describe(row: Mapping[str, Any]) -> str:
    """One row in a line."""
    losses = row["train_losses"]
    parts = [f"loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f}"] if losses else []
    for how, lengths in row["perplexity"].items():
        parts.append(f"{how} " + ", ".join(f"{n}: {math.exp(np.mean(nll)):.3f}" for n, nll in lengths.items()))
    return "; ".join([*parts, f"{row['seconds']:.0f} s"])


def _check(study: Study, out: Path) -> None:
    """Tell now of what would be told after hours of training."""
    from ..training.arms import patch_for
    from ..training.model import load_tokenizer
    from .run import check

    for arm, seed in study.todo():
        config = study.config_of(arm, seed, out / "run")
        patch_for(config.attention, config.options, config.layers, config.sinks)
    check(load_tokenizer(study.config), **study.asked())


def _one(study: Study, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    from ..training.lora import settle
    from ..training.model import load_model, load_tokenizer
    from ..training.run import train

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped half-way
    settings, config = study.arms[arm], study.config_of(arm, seed, folder)
    gpu = torch.cuda.is_available()
    begin = time.perf_counter()
    peak = None
    if arm == UNTUNED:
        model, losses = load_model(config).to("cuda" if gpu else "cpu"), []
        settle(model)
    else:
        result = train(config, None)
        model, losses = result.model, result.losses
        peak = max((step["peak_gib"] for step in result.log if "peak_gib" in step), default=None)
    trained = time.perf_counter()
    found = _judge(study, arm, model, load_tokenizer(config))
    del model
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - begin
    facts = {"arm": arm, "seed": seed, "settings": dict(settings), "train_losses": losses, "seconds": seconds}
    cost = {"train_seconds": trained - begin, "peak_gib": peak, "tokens": len(losses) * tokens_per_step(config)}
    return {**facts, **cost, "device": torch.cuda.get_device_name() if gpu else "CPU", **found}


def tokens_per_step(config: TrainConfig) -> int:
    """Of one process."""
    return config.length * config.batch_size * config.accumulate


def _judge(study: Study, arm: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Losses of every window, and the pass keys found, by how the model is run and by length."""
    from ..patching import remove
    from .run import evaluate

    patch = copy.deepcopy(model.config.lcpatch)
    remove(model)
    ways = [Arm(label="dense")]
    pattern = {"layers": patch["layers"], "mode": "always", **patch["options"]}
    grows = patch["options"].get("group_ratio") is None and not patch["options"].get("wrap")
    if patch["mode"] != "never" and grows:  # a share of the length, or its end rolled to its front, has no next token
        ways.append(Arm(patch["method"], pattern, label="patched"))
    if study.cache and arm in study.cached:
        options = study.cache_options or {}
        ways.append(Arm(cache=study.cache, cache_options=options, chunk=study.cache_chunk, label=study.cache))
    report = evaluate(model, tokenizer, **study.asked(), arms=ways, score="rank")
    found: dict[str, Any] = {"perplexity": {}, "tail": {}, "passkey": {}}
    for way in ways:
        for length in study.lengths:
            rows = report.rows_of("perplexity", way.label, length)
            found["perplexity"].setdefault(way.label, {})[str(length)] = [row["nll"] for row in rows]
            found["tail"].setdefault(way.label, {})[str(length)] = [row.get("tail_nll", row["nll"]) for row in rows]
            if study.passkey_seeds:
                keys = [row["rank"] for row in report.rows_of("passkey", way.label, length)]
                found["passkey"].setdefault(way.label, {})[str(length)] = sum(keys) / len(keys)
    return found
