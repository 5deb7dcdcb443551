"""The attention a model is trained with, by one flag: every arm of a comparison runs the same code.

full    dense everywhere, by the model's own implementation (under SDPA packed documents take a T x T mask); patched
        all the same, so that one code runs every arm
short   plain groups: SF with every head returned and no sinks
other   a registered method: shift, sf, s2, …
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.config import PatchConfig
from ..core.errors import UnknownNameError
from ..hf.layers import state_of
from ..hf.models import attention_modules, unwrap
from ..patching.resolve import pattern_of
from ..patterns import patterns

NAMED: dict[str, dict[str, Any]] = {
    "full": {"method": "sf", "mode": "never"},
    "short": {"method": "sf", "options": {"returned_fraction": 1.0, "num_sinks": 0}},
}


def patch_for(
    attention: str, options: dict[str, Any] | None = None, layers: Any = None, sinks: str | None = None
) -> PatchConfig:
    """The patch of an arm.

    Args:
        attention: "full", "short" or a registered method.
        options: of the method.
        layers, sinks: as `lcpatch.apply` takes them.

    Raises:
        UnknownNameError: no such arm.
        ValueError: options that do not fit, or an arm that takes none.
    """
    options = dict(options or {})
    if attention not in NAMED and attention not in patterns.all():
        try:
            patterns.get(attention)  # for its explanation of ambiguous names
        except UnknownNameError as error:
            raise UnknownNameError(f"attention: {error} Beside them: {', '.join(NAMED)}.") from None
    arm = NAMED.get(attention, {"method": attention})
    if attention == "full" and (options or layers):
        raise ValueError(f"attention='full' is dense: it takes no layers and no options ({', '.join(options)})")
    if fixed := sorted(options.keys() & arm.get("options", {}).keys()):
        raise ValueError(f"attention={attention!r} sets {fixed[0]} itself; take attention='sf' to choose it")
    patch = PatchConfig(**{**arm, "options": {**arm.get("options", {}), **options}, "layers": layers, "sinks": sinks})
    pattern_of(patch)  # its options are checked before a model is loaded
    return patch


def follows_length(patch: PatchConfig) -> bool:
    """Whether an arm needs the whole row at once."""
    return patch.mode != "never" and pattern_of(patch).follows_length


@contextmanager
def running(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """A patched model with its pattern on ("always") or off ("never"), whatever it was patched for.

    Unlike a patch with mode="always" this also takes groups that are a share of the length: whole sequences only.
    """
    states = [state for m in attention_modules(unwrap(model)).values() if (state := state_of(m)) is not None]
    before = [state.mode for state in states]
    for state in states:
        state.mode = mode
    try:
        yield model
    finally:
        for state, was in zip(states, before, strict=True):
            state.mode = was
