"""The silent traps around a patched model, each one really checked: the facts behind `lcpatch doctor`'s warnings.

`environment()` looks at what is installed, `check(model, …)` at one model. A finding is one sentence that says what
happens and what to do; what cannot be computed is not said.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from lcpatch_kernels.block_sparse import has_triton

from ..hf.models import attention_modules, unwrap
from .apply import record_of
from .report import report

SUPPORTED = {
    "python": ">=3.11",
    "torch": ">=2.11",
    "transformers": ">=5.17,<6",
    "huggingface_hub": ">=1.31,<3",
    "triton": ">=3.6",
    "peft": ">=0.20",
    "accelerate": ">=1.10",
}
"""Versions that lcpatch is tested with; of the optional ones if they are there."""


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    if package == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> list[str]:
    """What is wrong with the installed packages."""
    return [*_versions(), *_kernels_package(), *_triton()]


def check(model: nn.Module, tokenizer: Any = None, length: int | None = None) -> list[str]:
    """What may go wrong in silence with `model`, as it is configured and patched now.

    Args:
        model: a causal language model, patched or not.
        tokenizer: its tokenizer, if batches and truncation are to be checked.
        length: tokens of the longest sequence it is meant for, if known.
    """
    base = unwrap(model)
    findings = [*_carried_patch(base), *_dropout(base), *_sink_logits(base), *_packing(base), *_checkpointing(base)]
    if length is not None:
        findings += [*_positions(base, length), *_eager(base, length), *_density(base, length)]
    if tokenizer is not None:
        findings += _tokenizer(tokenizer, length)
    return findings


def _versions() -> Iterator[str]:
    for package, wanted in SUPPORTED.items():
        found = installed(package)
        if found is not None and not SpecifierSet(wanted).contains(Version(found).base_version):
            yield f"{package} {found} is outside the tested range {wanted}"


def _kernels_package() -> Iterator[str]:
    """Hugging Face's `kernels`, which a transformers release takes in a narrow range only, and a folder may shadow."""
    found = installed("kernels")
    if found is None:
        return
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        yield (
            f"kernels {found} does not go with transformers {installed('transformers')}: it loads no attention from "
            "the Hub (attn_implementation='org/kernel'); pip install 'transformers[kernels]' or leave it"
        )
    spec = find_spec("kernels")
    own = Path(str(distribution("kernels").locate_file("kernels/__init__.py"))).resolve()
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != own:
        yield f"{spec.origin} hides the installed package `kernels`; rename that folder or take it off the path"


def _triton() -> Iterator[str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available() and not has_triton():
        yield ("there is a GPU but no triton: patterns run in plain torch, slowly; pip install 'lcpatch[kernels]'")
    if torch.cuda.is_available() and interpreted:
        yield "TRITON_INTERPRET=1 is set: kernels run in Triton's interpreter, thousands of times slower; unset it"
    triton, numpy = installed("triton"), installed("numpy")
    if interpreted and triton and numpy and Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        yield f"triton {triton}'s interpreter fails with numpy {numpy}; take triton >= 3.7 or numpy < 2.4"


def _carried_patch(base: Any) -> Iterator[str]:
    patch = getattr(base.config, "lcpatch", None)
    if patch and record_of(base) is None:
        yield (
            f"config.json carries a patch ({patch.get('method')!r}), but this model runs without it; "
            "lcpatch.apply(model, model.config.lcpatch) puts it on"
        )


def _dropout(base: Any) -> Iterator[str]:
    dropping = []
    for index, module in attention_modules(base).items():
        dropout = getattr(module, "attention_dropout", 0.0)
        if getattr(dropout, "p", dropout):  # some models hold a Dropout module
            dropping.append(index)
    if dropping:
        yield f"layers {spans(dropping)} have attention dropout, which no pattern applies: set it to 0 before patching"


def _sink_logits(base: Any) -> Iterator[str]:
    modules = attention_modules(base)
    ignoring = [
        row.index
        for row in report(base)
        if row.runs == "sdpa" and isinstance(getattr(modules[row.index], "sinks", None), nn.Parameter)
    ]
    if ignoring:
        yield (
            f"layers {spans(ignoring)} have learned sink logits, which sdpa ignores in silence; "
            "load with attn_implementation='eager'"
        )


def _packing(base: Any) -> Iterator[str]:
    if record_of(base) is None and getattr(base.config, "use_cache", False):
        yield (
            "packed rows: with use_cache=True, the default even in training, documents told apart by position_ids see "
            "each other in this unpatched model; pass use_cache=False or cu_seq_lens_q/k (a patch keeps them apart)"
        )


def _checkpointing(base: Any) -> Iterator[str]:
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if checkpointing and getattr(base.config, "use_cache", False):
        yield "gradient checkpointing turns the cache off while training; set model.config.use_cache = False to say so"


def _positions(base: Any, length: int) -> Iterator[str]:
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        kind = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "default")
        yield (
            f"{length} tokens are beyond the {limit} positions of this model (rope_type={kind!r}): its quality "
            "collapses there, patched or not, unless config.rope_parameters scales them"
        )


def _eager(base: Any, length: int) -> Iterator[str]:
    eager = [row.index for row in report(base) if row.runs == "eager"]
    if eager:
        size = base.config.num_attention_heads * length * length * base.dtype.itemsize
        yield (
            f"layers {spans(eager)} run eager attention, which at {length} tokens holds {size / 2**30:.1f} GiB of "
            "scores a layer and row; load with attn_implementation='sdpa' if the model allows it"
        )


def _density(base: Any, length: int) -> Iterator[str]:
    from ..hf.layers import state_of

    specs = {state.spec for m in attention_modules(base).values() if (state := state_of(m)) is not None and state.spec}
    density = sum(spec.density(length) for spec in specs) / max(len(specs), 1)
    if density > 0.9:
        yield (
            f"at {length} tokens the pattern keeps {density:.0%} of all pairs and so saves next to nothing; "
            "take smaller groups, windows or strides, or longer texts"
        )


def _tokenizer(tokenizer: Any, length: int | None) -> Iterator[str]:
    if tokenizer.pad_token is None:
        yield "the tokenizer has no pad token, so it makes no batches; tokenizer.pad_token = tokenizer.eos_token"
    if tokenizer.padding_side != "left":
        yield (
            f"tokenizer.padding_side is {tokenizer.padding_side!r}: right for training, but generating in batches goes "
            "on after the pads; set it to 'left' there"
        )
    if length is not None and tokenizer.model_max_length < length:
        limit = tokenizer.model_max_length
        yield f"with truncation=True the tokenizer cuts at {limit} tokens; pass max_length={length}"


def spans(indices: list[int]) -> str:
    """Layer indices in short: "0-29", "0, 2, … 28", "0-3, 7"."""
    step = indices[1] - indices[0] if len(indices) > 3 else 1
    if step > 1 and indices == list(range(indices[0], indices[-1] + 1, step)):
        return f"{indices[0]}, {indices[1]}, … {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
