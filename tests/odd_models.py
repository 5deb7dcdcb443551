"""Tiny random models with ways of their own, which what works for `models.FAMILIES` does not suit."""

import torch
import transformers
from models import VOCAB
from torch import nn

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
SETTINGS = {
    # Windows in some layers, which every attention module names; positions in those alone.
    "Exaone4": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    # Takes a view of what attention returned.
    "Afmoe": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
    },
    # Its `decoder` is the matrix of the logits.
    "ModernBertDecoder": {
        "local_attention": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 4,
        "initializer_range": 0.02,
        **{f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "cls", "sep"))},
        "eos_token_id": None,
    },
    "Phi": {},  # turns half of every head
    "DiffLlama": {},  # attends twice, to either half of its values
    "JetMoe": {"kv_channels": 16, "num_experts_per_tok": 2, "num_local_experts": 4},  # repeats keys for its experts
    # Calls the decoder inside its base model. A bias of the keys has no gradient but rounding.
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0, "enable_bias": False, "pad_token_id": 0},
}


def make(prefix: str, **changes) -> nn.Module:
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **SETTINGS[prefix], **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).train()
