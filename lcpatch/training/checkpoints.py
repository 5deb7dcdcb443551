"""Checkpoints that are whole or absent, and the record of what run a folder belongs to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.disk import why_unwritten
from ..core.errors import TrainingError
from ..hf.models import attention_modules, unwrap
from ..hf.sinks import sink_parameters
from .sharded import put_tensor, whole_tensor

RUN_FILE = "run.json"
TRAINER_STATE_NAME = "trainer_state.json"  # as transformers calls it
SINKS_FILE = "sinks.safetensors"
STAGING = ".incomplete"
MAY_CHANGE = ("save_every", "keep", "resume", "evaluate_every", "log_every", "report_to", "workers", "merged", "output")
"""Settings that change no weight, so that a resumed run may have others."""
DATA = "data_content"
LAUNCH = ("processes", "weights")
"""How a run is launched: what rows a step has, and what files a checkpoint. Where no step is left it may differ."""


def resumed_from(folder: Path, run: dict[str, Any], resume: str) -> Path | None:
    """The checkpoint in `folder` that a run goes on from; None: it begins.

    Args:
        folder: of the run.
        run: its settings and what its data is.
        resume: "auto", or "never" to refuse a folder that holds a run.

    Raises:
        ValueError: the folder holds another run; the message says in what they differ.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("checkpoint-*")):
            raise ValueError(f"{folder} holds checkpoints of another program; take another --output")
        return None
    if resume == "never":
        raise ValueError(f"{folder} holds a run already; take another --output, delete it, or leave --resume out")
    known, last = _known_run(file), last_checkpoint(folder)
    finished = last is not None and step_of(last) >= run["steps"]
    may_change = (*MAY_CHANGE, *LAUNCH) if finished else MAY_CHANGE
    for name in sorted(known.keys() | run.keys()):
        if name not in may_change and known.get(name) != run.get(name):
            empty = [p.name for p in folder.iterdir()] == [RUN_FILE]
            instead = "delete it, as nothing was saved there," if empty else "take another --output,"
            differs = f"a run with {name}={known.get(name)!r}, this one has {run.get(name)!r}"
            if name == DATA:
                differs = "a run on other data: what --data names has changed since, or is tokenized otherwise now"
            raise ValueError(f"{folder} holds {differs}: {instead} or take the same settings to go on with that run")
    discard(folder / STAGING)  # left by a kill in the middle of a write
    if last is not None:
        with reading(last):
            json.loads((last / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the first that is wanted of it
    return last


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The folder for this process alone: two runs would write over each other's checkpoints.

    Raises:
        ValueError: another process trains there, or there can be no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder ({error.strerror}); take another --output") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # as the end of the process does, however it ends


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process trains in {folder} now: wait for it, or take another --output") from None
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{folder} cannot be locked ({error}): see to it that no other run writes there", stacklevel=2)


def claim(folder: Path, run: dict[str, Any]) -> None:
    """Make `folder` the place of a run that begins or goes on now."""
    if not (folder / RUN_FILE).is_file():
        with arriving(folder / RUN_FILE) as new:
            new.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _known_run(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ValueError(f"{file} does not say which run the folder holds: take another --output, or delete the folder")
    return known


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A path beside `target` that becomes it in one step when the block ends well, and vanishes when it does not.

    Raises:
        TrainingError: it could not be written.
    """
    staging = target.parent / STAGING
    new = staging / target.name
    discard(staging)
    try:
        with writing(str(target), target.parent):
            staging.mkdir(parents=True)
            yield new
            if target.is_dir():
                os.replace(target, staging / ".old")
            os.replace(new, target)
    finally:
        discard(staging)


def discard(folder: Path) -> None:
    """Delete a folder and what is in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one of the run in `folder`."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(folder))
    return None if last is None else Path(last)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Say of a write that fails what is missing now, and how the run in `folder` goes on.

    Raises:
        TrainingError: `what` could not be written.
    """
    try:
        yield
    except Exception as error:
        reason = why_unwritten(error, folder)
        if reason is None:
            raise
        last = last_checkpoint(folder)
        kept = "there is no checkpoint yet" if last is None else f"the last whole checkpoint is {last}"
        raise TrainingError(
            f"{what} could not be written ({reason}); nothing half-written was left, {kept}. Make room, and run the "
            "same command to go on"
        ) from error


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Say of a checkpoint that cannot be read how to go on without it.

    Raises:
        TrainingError: a file of it is missing or damaged.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, UnpicklingError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # of the device, or of shapes: the files are well
        raise TrainingError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}); delete it to go on from the checkpoint "
            "before it, or from the beginning if there is none"
        ) from error


def sinks_of(model: nn.Module) -> dict[str, Tensor]:
    """The learnable sinks, which no adapter holds; a collective where weights are in pieces."""
    return {name: whole_tensor(p) for name, p in _sinks(model).items()}


def save_sinks(sinks: dict[str, Tensor], folder: Path) -> None:
    """Write them, if there are any."""
    if sinks:
        save_file(sinks, folder / SINKS_FILE)


def load_sinks(model: nn.Module, folder: Path) -> None:
    """Read them back, as exactly as they were."""
    wanted = _sinks(model)
    if not wanted:
        return
    found = load_file(folder / SINKS_FILE)
    for name, parameter in wanted.items():
        put_tensor(parameter, found[name])


def _sinks(model: nn.Module) -> dict[str, nn.Parameter]:
    return sink_parameters(attention_modules(unwrap(model)))
