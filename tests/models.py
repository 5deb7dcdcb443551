"""Tiny random models of every supported family, and the options that make a method sparse on a short text.

Weights are drawn wide (`initializer_range`), so that attention is far from uniform and a wrong mask cannot hide.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 61
TOKENS = 75
"""Length of a test's text: several blocks, groups and windows of `SHORT`, and a multiple of none of them."""

SHORT: dict[str, dict[str, Any]] = {
    "s2": {"block_size": 16, "local_blocks": 1, "stride": 3, "sink_blocks": 0},
    "shift": {"group_size": 22},
    "sf": {"group_size": 22, "num_sinks": 3},
    "sink": {"num_sinks": 2, "window": 9},
}
"""Options that make a method sparse on `TOKENS` tokens; a method that is not listed runs with its defaults."""

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that generation has the length it was asked for
}
_HYBRID = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
_NO_HEAD_DIM = {"head_dim": None, "hidden_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", _NO_HEAD_DIM),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {**_HYBRID, "sliding_window": 20, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {**_HYBRID, "sliding_window": 20, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", _NO_HEAD_DIM),
    "gpt_neox": ("GPTNeoX", _NO_HEAD_DIM),
    "olmo2": ("Olmo2", _NO_HEAD_DIM),
    "smollm3": ("SmolLM3", {**_NO_HEAD_DIM, "no_rope_layers": [1, 0]}),
    "gpt_oss": ("GptOss", {**_HYBRID, "sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "granite": ("Granite", {**_NO_HEAD_DIM, "attention_multiplier": 0.5, "logits_scaling": 1.0}),
}
"""Family -> (prefix of its classes in transformers, its own settings)."""

HYBRID = [name for name, (_, settings) in FAMILIES.items() if "layer_types" in settings]


def config_for(family: str, **overrides: Any) -> Any:
    """A config of `family` at the tests' sizes."""
    prefix, own = FAMILIES[family]
    kind = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    settings = {k: v for k, v in {**_SIZES, **own, **overrides}.items() if k != "head_dim" or v is not None}
    return kind(**settings)


def build(family: str = "llama", attn: str | None = None, seed: int = 0, config: Any = None, **overrides: Any) -> Any:
    """A random model in fp32 and eval mode.

    Args:
        family: a key of `FAMILIES`.
        attn: attention implementation; None: the family's own choice.
        seed: of the weights.
        config: a config object to use as it is.
        **overrides: settings of the config.
    """
    config = config_for(family, **overrides) if config is None else config
    if attn is None and family == "gemma2":
        attn = "eager"  # transformers before 5.23 chose sdpa, which drops the softcap
    if attn is not None:
        config._attn_implementation = attn
    torch.manual_seed(seed)
    prefix, _ = FAMILIES[family]
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default has no float64, and "eager" does not compile
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):  # a family may start them at zero, where they would prove nothing
            nn.init.normal_(parameter)
    return model


def tokens(batch: int = 1, length: int = TOKENS, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length], none of them a special one."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of `model`, by layer."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    return sorted(found, key=lambda m: m.layer_idx)


def attention_outputs(model: nn.Module, run: Callable[[], Any]) -> list[torch.Tensor]:
    """What each attention module returns during `run()`, in the order of the calls."""
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out[0])) for m in attention_layers(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen
