"""LoRA+ of LongLoRA: LoRA on the attention projections, and every norm and the input embeddings trained in full.

Source: "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv 2309.12307, section 3.3: LoRA
alone leaves a gap to full fine-tuning (perplexity 11.44 against 8.08 at 32K) that embeddings and norms close (8.12).
Not the method of that name that gives A and B different learning rates. Departure: the norms and embeddings are PEFT's
`modules_to_save`, so that all that was trained lies in one adapter, which PEFT loads and merges by itself; the authors
save them apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedModelError
from ..hf.models import attention_modules, unwrap
from ..hf.sinks import is_sink

TUNE = ("lora+", "lora", "full")


def prepare(model: nn.Module, tune: str = "lora+", *, r: int = 8, alpha: int = 16, dropout: float = 0.0) -> nn.Module:
    """Make the parameters that are trained trainable, in fp32, and freeze the others.

    In bf16 an update of 2e-5 is lost on every weight above 0.005, so what is trained is fp32 whatever the model is; the
    embeddings still hand on the model's own dtype, or the residual stream would double.

    Args:
        model: a causal language model of transformers, patched or not.
        tune: "lora+", "lora" (projections only) or "full" (every parameter, no adapter).
        r, alpha, dropout: of LoRA.

    Returns:
        A PEFT model around `model`, or `model` itself for "full".

    Raises:
        ImportError: no peft.
        UnsupportedModelError: its attention has no linear projections, or its tied embeddings need a newer peft.
    """
    if tune not in TUNE:
        raise ValueError(f"tune={tune!r} is not one of {', '.join(TUNE)}")
    if tune == "full":
        if getattr(model, "is_quantized", False):
            raise ValueError("tune='full' cannot train 4-bit weights: take tune='lora+', or leave quantize out")
        model.requires_grad_(True).float()
        return model
    if min(r, alpha) < 1 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA needs r={r} and alpha={alpha} of at least 1 and dropout={dropout} in [0, 1)")
    tied = _is_tied(model)
    wrapped = _peft().get_peft_model(model, _config(model, tune, r, alpha, dropout))
    if tied and not _is_tied(wrapped):
        raise UnsupportedModelError(
            f"{model.config.model_type}: its head is its embedding, and peft would train them apart here; load it with "
            "tie_word_embeddings=False, or take tune='lora'"
        )
    for name, parameter in wrapped.named_parameters():
        if is_sink(name):  # PEFT freezes all that is not its own
            parameter.requires_grad_(True)
    for parameter in trainable(wrapped):
        parameter.data = parameter.data.float()
    return wrapped


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are trained, each once."""
    return (p for p in model.parameters() if p.requires_grad)


def merge(model: nn.Module) -> nn.Module:
    """The plain model with the adapter's update in its weights, still patched if it was; a full model as it is.

    Raises:
        UnsupportedModelError: its weights are 4-bit, so that a merge would round.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    if getattr(unwrap(model), "is_quantized", False):
        raise UnsupportedModelError("a merge into 4-bit weights rounds: load the base in bf16, and the adapter onto it")
    merged = model.merge_and_unload()
    merged.tie_weights()
    return merged


def projections(model: nn.Module) -> list[str] | str:
    """The linear projections of the self-attention modules, as PEFT's `target_modules`.

    Names such as "q_proj", or the fused ones of the model's family; where modules outside attention have the same ones
    (GPT-2's `c_proj`), a regular expression that only attention matches.

    Raises:
        UnsupportedModelError: there are none.
    """
    base = unwrap(model)
    attention = {name for name, module in base.named_modules() if module in set(attention_modules(base).values())}
    linear = {name for name, m in base.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    inside = {name for name in linear if name.rpartition(".")[0] in attention}
    if not inside:
        raise UnsupportedModelError(
            f"{base.config.model_type}: its attention has no linear projections as children, which LoRA+ adapts; take "
            "tune='full'"
        )
    leaves = sorted({name.rpartition(".")[2] for name in inside})
    if {name for name in linear if name.rpartition(".")[2] in leaves} == inside:
        return leaves
    parents = sorted({name.split(".")[-2] for name in inside})
    return rf".*\.({'|'.join(map(re.escape, parents))})\.({'|'.join(map(re.escape, leaves))})"


def norms_and_embeddings(model: nn.Module) -> list[str]:
    """Names of every norm and of the input embeddings, as PEFT's `modules_to_save`; the head is not among them."""
    base = unwrap(model)
    embeddings = base.get_input_embeddings()
    found = {
        name.rpartition(".")[2] for name, module in base.named_modules() if module is embeddings or _is_norm(module)
    }
    return sorted(found)


def _is_tied(model: nn.Module) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _config(model: nn.Module, tune: str, r: int, alpha: int, dropout: float) -> Any:
    lora = _peft().LoraConfig
    settings: dict[str, Any] = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    if tune == "lora+":
        settings["modules_to_save"] = norms_and_embeddings(model)
        if getattr(model.config, "tie_word_embeddings", False):
            if "ensure_weight_tying" not in {f.name for f in dataclasses.fields(lora)}:
                raise UnsupportedModelError(
                    "this model's head is its embedding, and this peft would train a copy of one of them: "
                    "pip install -U peft (0.18 and later keep them tied)"
                )
            settings["ensure_weight_tying"] = True
    return lora(target_modules=projections(model), **settings)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: pip install 'lcpatch[train]' ({error})") from error
    return peft


@contextmanager
def keep_dtype(model: nn.Module) -> Iterator[None]:
    """Activations in the dtype of the frozen weights, as when the model runs alone, though what is trained is fp32.

    For a block that trains under autocast. There every projection rounds its input to that dtype, so a forward's values
    stay what they are; but fp32 embeddings would double the residual stream, fp32 norms would have three projections
    round the same tensor, and PEFT would widen each input of LoRA for autocast to round it again.
    """
    dtype = _frozen_dtype(model)
    with ExitStack() as stack:
        if dtype != torch.float32:
            for module in [unwrap(model).get_input_embeddings(), *filter(_is_norm, unwrap(model).modules())]:
                hook = module.register_forward_hook(lambda module, args, out: out.to(dtype))
                stack.callback(hook.remove)
            if hasattr(model, "peft_config"):
                from peft.helpers import disable_input_dtype_casting

                stack.enter_context(disable_input_dtype_casting(model))
        yield


def settle(model: nn.Module) -> None:
    """After training: norms and embeddings in the dtype of the frozen weights, so that the model runs without autocast.

    As it is when it is loaded; PEFT's layers see to LoRA's own fp32 weights.
    """
    dtype = _frozen_dtype(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and not is_sink(name):
            parameter.data = parameter.data.to(dtype)


def _frozen_dtype(model: nn.Module) -> torch.dtype:
    frozen = (p.dtype for p in unwrap(model).parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, torch.float32)
