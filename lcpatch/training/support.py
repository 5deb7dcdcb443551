"""What a model is prepared with for a chunkwise backward, and which models are refused because it would be inexact."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lcpatch_kernels.block_sparse import TRITON_DTYPES, TRITON_MAX_HEAD_DIM, has_triton

from ..core.errors import UnsupportedModelError
from ..hf import NAME
from ..hf.head import decoder_of
from ..hf.layers import head_dim_of, state_of
from ..hf.models import attention_modules, full_attention_layers, uncompiled, unwrap
from ..hf.route import route, unroute
from ..hf.state import ATTRIBUTE, dense_name
from ..hf.watch import WATCH, unwatch
from .loss import IGNORE
from .packing import why_no_packing
from .pads import check_pads
from .text import Text

logger = logging.getLogger(__name__)

ATTENTION = ("auto", "own", "lcpatch", "cudnn")
KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose state is nothing but keys and values."""
INSTEAD = "use loss.backward() with gradient checkpointing for this model"


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile.

    Raises:
        UnsupportedModelError: inside a wrapper that shards or replicates in a way that chunks would upset.
    """
    model = uncompiled(model)
    if isinstance(model, DistributedDataParallel):
        model = uncompiled(model.module)
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if other := kinds & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "DataParallel"}:
        raise UnsupportedModelError(
            f"chunkwise backward runs a model as it is or in DistributedDataParallel, not in {other.pop()}, whose "
            "hooks expect one forward and one backward a step"
        )
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the model's attention is ours."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def ranks_of(model: nn.Module) -> Any:
    """The ranks that share the model's attention (see `parallel`), or None."""
    states = (module.__dict__.get(ATTRIBUTE) for module in without_wrapper(model).modules())
    return next((state.parallel for state in states if state is not None and state.parallel is not None), None)


def check_model(model: nn.Module, text: Text, num_chunks: int) -> Any:
    """The transformers model inside `model`, if chunks of it give the exact gradient.

    Raises:
        UnsupportedModelError: they would not; the message says why.
        ValueError: a pattern that needs the whole sequence, pads that see it and have a label, or nothing to train.
    """
    if not torch.is_grad_enabled():
        raise ValueError("gradients are off here: call this outside of torch.no_grad() and torch.inference_mode()")
    inner = without_wrapper(model)
    base = unwrap(inner)
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "base_model") or decoder_of(base) is base:
        raise UnsupportedModelError(f"{type(base).__name__} is not a causal language model of transformers with a head")
    if reason := why_inexact(inner, config, text.ids.shape[1]):
        raise UnsupportedModelError(f"{config.model_type}: {reason}; {INSTEAD}")
    if text.documents is not None and (reason := why_no_packing(decoder_of(base))):
        raise UnsupportedModelError(f"{config.model_type} {reason}: give it one document a row")
    check_pads(base, text)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    if num_chunks > 1:
        if any(p._post_accumulate_grad_hooks for p in model.parameters()):
            raise ValueError(
                "a parameter has a hook that follows its gradient (register_post_accumulate_grad_hook), as of an "
                "optimizer that steps inside of backward: it would run after every chunk; take one that steps later"
            )
        for module in base.modules():
            state = state_of(module) if hasattr(module, "layer_idx") else None
            if state is not None and state.follows_length and state.active_spec(module) is state.spec:
                raise ValueError(
                    f"{state.method}: a group_ratio is a share of the whole sequence, which a chunk does not see; give "
                    f"a fixed group_size, as in lcpatch.apply(model, {state.method!r}, group_size=1024)"
                )
    return base


def why_inexact(model: nn.Module, config: Any, length: int) -> str | None:
    """Why chunks would not give this model's gradient; None: they do."""
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return "only a decoder alone can be run in chunks; load the text-only class"
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(c, "is_prompt_learning", False) for c in adapters):
        return "an adapter of learnt virtual tokens puts them before every chunk, not before the text"
    if any(getattr(c, "alora_invocation_tokens", None) for c in adapters):
        return "an adapter of aLoRA begins where the text invokes it, which a chunk after that does not see"
    if getattr(config, "output_router_logits", False):
        return "the routers' auxiliary loss is not a sum over tokens; set config.output_router_logits = False"
    if other := set(getattr(config, "layer_types", None) or ()) - set(KINDS):
        return f"layers of kind {', '.join(sorted(other))} carry a state that is not keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"its last {config.num_kv_shared_layers} layers read other layers' keys"
    if own_loss(model):
        return (
            "its loss is not the cross-entropy of the next token (model.loss_function, its class or its adapter says "
            "another)"
        )
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        return "an attention module of it is not causal (an encoder's is with config.is_decoder = True)"
    return _changing_rope(config, length)


def own_loss(model: nn.Module) -> bool:
    """Whether the model's loss is another one than transformers' for causal language models.

    Set by the user or by its class; with what an adapter adds to it; or, as decoders with an encoder compute it, of
    labels that are not shifted.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    base = unwrap(model)
    added = {"ADALORA", "SHADOW"} & {c.peft_type for c in getattr(model, "peft_config", {}).values()}
    if added or any(name.endswith("encoder_attn") for name, _ in base.named_modules()):
        return True
    forward = inspect.unwrap(type(base).forward)
    if forward.__module__.startswith("transformers.") and "loss_function" not in forward.__code__.co_names:
        return True
    of_its_class = LOSS_MAPPING.get(getattr(base, "loss_type", None), ForCausalLMLoss)
    return getattr(base, "_loss_function", of_its_class) is not ForCausalLMLoss


def _changing_rope(config: Any, length: int) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in rope.values() if isinstance(one, dict)]  # one set for each kind of layer, or None for some
    for one in kinds or (rope,):
        kind = one.get("rope_type", "default")
        trained = one.get("original_max_position_embeddings")
        for name in ("original_max_position_embeddings", "max_position_embeddings"):
            trained = trained or getattr(config, name, None)
        trained = trained or length
        if kind in ("dynamic", "longrope") and length > trained:
            return (
                f"rope_type={kind!r} rotates by the length of the text at hand, so a chunk beyond {trained} tokens "
                "would disagree with one before; use linear or yarn"
            )
    return None


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """What torch.compile wrapped around attention runs as it is: its graphs would be made anew for every chunk.

    Nothing else does: FlexAttention, which is compiled where it is called, would hold all scores.
    """
    compiled = [m for m in model.modules() if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    around = [m for m in compiled if any(hasattr(inside, "layer_idx") for inside in m.modules())]
    wrappers = {m: m.forward for m in around if "_orig_mod" in m._modules}
    in_place = {m: m._compiled_call_impl for m in around if m._compiled_call_impl is not None}
    if wrappers or in_place:
        logger.info("chunkwise: torch.compile is off around chunks; what is compiled inside of layers stays so")
    try:
        for module in wrappers:
            module.forward = module._orig_mod.__call__
        for module in in_place:
            module._compiled_call_impl = None
        yield
    finally:
        for module, forward in wrappers.items():
            module.forward = forward
        for module, call in in_place.items():
            module._compiled_call_impl = call


class Checkpointed:
    """The layers that run under gradient checkpointing, sought once a text: LoRA makes thousands of modules."""

    def __init__(self, base: nn.Module) -> None:
        able = (m for m in base.modules() if hasattr(m, "_can_checkpoint_with_cache"))
        self._layers = [m for m in able if getattr(m, "gradient_checkpointing", False)]

    @contextmanager
    def chunk(self, recording: bool) -> Iterator[None]:
        """As a chunk needs it: off where there are no gradients, with the cache where there are.

        transformers takes the cache away from a checkpointed layer, as most caches would be written twice. Ours may.
        """
        name, value = ("gradient_checkpointing", False) if recording else ("_can_checkpoint_with_cache", True)
        before = [m.__dict__.get(name) for m in self._layers]
        for module in self._layers:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, old in zip(self._layers, before, strict=True):
                if old is None:
                    delattr(module, name)
                else:
                    setattr(module, name, old)


@contextmanager
def routed(model: nn.Module, base: Any, attention: str, text: Text) -> Iterator[frozenset[int]]:
    """For a while, lead full-attention layers through our op; yields the layers that then ask their cache to attend.

    Args:
        model: the model or what PEFT made of it.
        base: the transformers model inside.
        attention: "auto", "own", "lcpatch" or "cudnn" (see `chunkwise.backward`).
        text: what is run.

    Raises:
        ValueError: an unknown choice, or one that would not compute what the model does.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention={attention!r} is not one of {', '.join(ATTENTION)}")
    reason = None if attention == "own" else _not_ours(base, text)
    if attention in ("lcpatch", "cudnn") and reason:
        raise ValueError(f"attention={attention!r} would not compute what this model does: {reason}; use 'own'")
    if attention == "own" or reason or (attention == "auto" and not _has_kernel(base)):
        if reason:
            logger.info("chunkwise: attention stays the model's own: %s", reason)
        yield frozenset()
        return
    modules = attention_modules(base)
    fresh = base.config._attn_implementation != NAME
    new = {n: m for n, m in modules.items() if WATCH not in m.__dict__}
    try:
        route(model)
        yield frozenset(full_attention_layers(base.config, modules))
    finally:
        if fresh:
            unroute(model)
        else:
            for module in new.values():
                unwatch(module)


def _not_ours(base: Any, text: Text) -> str | None:
    """Why our op would not do what the model's full-attention layers do; None: it does."""
    mask = None if text.mask is None else text.mask.cpu().bool()
    if mask is not None and bool((text.targets.ne(IGNORE) & ~mask & mask.cumsum(-1).bool()).any()):
        return "pads behind a text have labels, and ours lets them see nothing; set those to -100"
    try:
        modules = attention_modules(base)
    except UnsupportedModelError as error:
        return str(error)
    if not full_attention_layers(base.config, modules):
        return "it has no full-attention layer"
    for module in modules.values():
        dropout = getattr(module, "attention_dropout", 0.0)
        if getattr(dropout, "p", dropout) and module.training:
            return "it has attention dropout, which a kernel does not apply"
    name = base.config._attn_implementation
    name = dense_name(base.config) if name == NAME else name
    return None if name in ("sdpa", "eager") else f"attn_implementation={name!r} may mean more than causal attention"


def _has_kernel(base: Any) -> bool:
    weight = next(base.parameters())
    head_dim = max(map(head_dim_of, attention_modules(base).values()))
    return weight.is_cuda and has_triton() and weight.dtype in TRITON_DTYPES and head_dim <= TRITON_MAX_HEAD_DIM


class RandomState:
    """Where torch's random numbers stand, on the CPU and on the devices in use."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> None:
        """Go back there."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
