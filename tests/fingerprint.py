"""What hangs on a model and in transformers' registries, to compare before and after."""

import copy
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on a model: every module's attributes, parameters and hooks, and every config's content."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, dict):  # parameters, buffers, submodules, hooks: by name and identity
                found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
            else:
                found[f"{name}.{key}"] = id(value) if not isinstance(value, (bool, int, float, str)) else value
        if (config := module.__dict__.get("config")) is not None:
            found[f"{name}.config.content"] = copy.deepcopy(config.__dict__)
    found["parameters"] = [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()]
    found["state_dict"] = list(model.state_dict())
    found["generation"] = copy.deepcopy(model.generation_config.to_dict())
    return found


def registries() -> tuple[dict, dict]:
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
