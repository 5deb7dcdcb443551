"""Save a patched model so that the patch comes back with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..core.config import PatchConfig
from ..hf import NAME
from ..hf.models import attention_modules, uncompiled, unwrap
from ..hf.sinks import give_sinks, sink_parameters, sinks_of
from ..patching.apply import record_of
from .sidecar import POSITIONS, write_config, write_sinks


def save_pretrained(model: nn.Module, path: str | Path, *, tokenizer: Any = None, **kwargs: Any) -> None:
    """Save a patched model, or the adapter of a PEFT model around one, for `lcpatch.from_pretrained`.

    A full model's `config.json` carries the patch. Where inference itself needs lcpatch, it also names the attention
    implementation, so that transformers alone refuses the model with an error (or runs it dense, if asked for
    `attn_implementation="sdpa"`) and re-applies the patch after `lcpatch.register()`. A model that is sparse only in
    training loads anywhere.

    Args:
        model: what `lcpatch.apply` patched.
        path: a folder; made if it does not exist.
        tokenizer: saved into the same folder.
        **kwargs: for the model's own `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: the model is not patched, or another format than safetensors is asked for.
    """
    folder = Path(path)
    model = uncompiled(model)
    patch = patch_of(model)
    if not kwargs.pop("safe_serialization", True):
        raise ValueError("safe_serialization=False would write pickles; lcpatch saves safetensors only")
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    has_readme = (folder / "README.md").exists()
    with _ready_to_save(model, patch) as sinks:
        model.save_pretrained(folder, **kwargs)
        write_sinks(folder, sinks)
    if not has_readme:
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, with nothing filled in
    config = unwrap(model).config
    is_adapter = hasattr(model, "peft_config")
    positions = {name: value for name in POSITIONS if (value := getattr(config, name, None)) is not None}
    write_config(folder, patch, positions if is_adapter else None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def patch_of(model: nn.Module) -> PatchConfig:
    """The patch that `model` runs under.

    Raises:
        ValueError: there is none.
    """
    record = record_of(unwrap(model))
    if record is None:
        raise ValueError("this model is not patched: lcpatch.apply(model, …) first, or use its own save_pretrained")
    return record.config


def needs_lcpatch(patch: PatchConfig) -> bool:
    """Whether inference under `patch` differs from the plain model's: sparse itself, or with learned sinks."""
    return patch.mode == "always" or patch.has_learnable_sinks


@contextmanager
def _ready_to_save(model: nn.Module, patch: PatchConfig) -> Iterator[dict[str, nn.Parameter]]:
    """The model as it is saved: the attention's name in the config, the learnable sinks (yielded, by name) taken out.

    Among the weights, they would be unknown to whoever loads them before the patch is on.
    """
    base = unwrap(model)
    modules = attention_modules(base)
    sinks = sink_parameters(modules)
    held = {index: sinks_of(module) for index, module in modules.items()}
    for module in modules.values():
        give_sinks(module, {})
    if needs_lcpatch(patch):
        base.config.attn_implementation = NAME  # the attribute, unlike the active implementation, reaches config.json
    try:
        yield sinks
    finally:
        base.config.__dict__.pop("attn_implementation", None)
        for index, module in modules.items():
            give_sinks(module, held[index])
