"""What every recipe does: read its settings, train, say what came out."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.program import USER_ERRORS, sentence, show_warning
from .config import load

STOPPED = 143
"""Exit status of a run that SIGTERM stopped, as a shell reports it: its checkpoint waits for the same command."""
INTERRUPTED = 130
"""Of one that Ctrl-C stopped at once, which leaves the checkpoints that are there."""


def main(argv: Sequence[str] | None, defaults: Mapping[str, Any], save: Callable[..., None], says: str = "") -> int:
    """Run one recipe and return its exit status.

    Args:
        argv: the command line's words; None: the process's own.
        defaults: the recipe's settings.
        save: `lcpatch.save_pretrained`.
        says: the recipe's docstring, for `--help`.
    """
    config = load(argv, defaults, says)
    from accelerate import PartialState

    from .run import train

    result = train(config, save)
    if PartialState().is_main_process:
        print(summary(result, config.output))
    return 0 if result.finished else STOPPED


def script(run: Callable[[], int]) -> None:
    """Run a recipe as a program: a user's error is one sentence, and a warning one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            status = run()
    except KeyboardInterrupt:
        print(f"\n{sys.argv[0]}: interrupted; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        print(f"{sys.argv[0]}: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    _leave_group()
    sys.exit(status)


def _leave_group() -> None:
    """End the processes' group while Python is whole.

    A thread of gloo's that lets go of its last tensor while the interpreter shuts down aborts a process that has done
    and written everything (pytorch #190489): one exit of some 600 on a busy machine. Ending the group joins these
    threads, except FSDP2's, whose group DTensor's caches keep: they get a moment to let go.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a trainer is part of cycles, and its DistributedDataParallel holds the group
        distributed.destroy_process_group()
        time.sleep(0.2)


def summary(result: Any, output: str) -> str:
    """What a run came to, in a few lines."""
    if not result.finished:
        return f"stopped at step {result.step}; the same command goes on from the checkpoint in {output}"
    lines = [
        f"evaluation, {name}: loss {loss:.4f}"
        for name in ("dense", "patched")
        if (loss := result.metrics.get(f"eval_{name}_loss")) is not None
    ]
    if result.losses:
        first = result.step - len(result.losses) + 1
        which = f"{result.step} steps" if first == 1 else f"steps {first} to {result.step}"  # those before were told
        lines.insert(0, f"{which}, loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}")
    return "\n".join([*lines, f"model: {output}/model   (lcpatch.from_pretrained loads it)"])
