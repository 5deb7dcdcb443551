"""Context extension: a config whose rotary positions reach a longer length, on top of the scaling it has, or refused.

Sources: linear (position interpolation), arXiv 2306.15595; yarn, arXiv 2309.00071; dynamic (NTK), as transformers has
it. As in LongLoRA's code the factor is a whole number: the least that reaches the length.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

from ..core.errors import UnsupportedModelError

KINDS = ("linear", "yarn", "dynamic")


def extend(config: Any, length: int, kind: str = "linear") -> Any:
    """A copy of `config` for sequences of `length` tokens; `config` itself if it reaches that far already.

    The model must be built with the result: its rotary frequencies are made from the config.

    Args:
        config: of a causal language model.
        length: tokens of the longest sequence.
        kind: "linear", "yarn" or "dynamic".

    Raises:
        ValueError: an unknown kind.
        UnsupportedModelError: a model without rotary positions, or with a scaling that `kind` does not compose with.
    """
    if kind not in KINDS:
        raise ValueError(f"rope={kind!r} is not one of {', '.join(KINDS)}, none")
    if (text := config.get_text_config()) is not config:
        if extend(text, length, kind) is text:
            return config
        raise UnsupportedModelError(
            f"{config.model_type} has several parts, and only a language model alone is extended to {length} tokens: "
            "save it by itself first, or take rope='none'"
        )
    limit = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None)
    if limit is None or not parameters:
        raise UnsupportedModelError(
            f"{config.model_type} has no rotary positions to scale (config.rope_parameters), so it cannot be extended "
            f"to {length} tokens"
        )
    if length <= limit:
        return config
    config = copy.deepcopy(config)
    flat = "rope_type" in parameters or "rope_theta" in parameters
    full = parameters if flat else parameters.get("full_attention")
    limit = max(limit, _reach(full or {}))
    factor = math.ceil(length / limit)
    if factor == 1:
        config.max_position_embeddings = limit
        return config
    if flat:
        config.rope_parameters = _scaled(config, dict(parameters), kind, factor, limit)
    else:  # one set for each kind of layer; those with a window never see further than it
        if full is None:
            raise UnsupportedModelError(
                f"{config.model_type} has no full-attention layer with rotary positions to scale; rope='none' takes it "
                "as it is"
            )
        config.rope_parameters = {
            **copy.deepcopy(parameters),
            "full_attention": _scaled(config, dict(full), kind, factor, limit),
        }
    if kind != "dynamic":  # which counts from the trained length, and takes this number for it
        config.max_position_embeddings = factor * limit
    return config


def _reach(parameters: dict[str, Any]) -> int:
    """Positions that a config's own yarn reaches: beside it `max_position_embeddings` may still be what was before."""
    if parameters.get("rope_type") != "yarn":
        return 0
    return int(parameters["factor"] * parameters["original_max_position_embeddings"])


def _scaled(config: Any, parameters: dict[str, Any], kind: str, factor: int, limit: int) -> dict[str, Any]:
    """The scaled parameters of one kind of layer."""
    own = parameters.get("rope_type", "default")
    if own != "default" and (own != kind or kind == "dynamic"):
        choices = [own] if own in ("linear", "yarn") else []
        raise UnsupportedModelError(
            f"{config.model_type} scales its positions by rope_type={own!r} already, which {kind!r} would destroy; "
            f"{'what composes with it: ' + choices[0] if choices else 'nothing composes with it'}. Or train at no more "
            f"than its {limit} positions"
        )
    if own == "linear":
        warnings.warn(
            f"{config.model_type} divides its positions by {parameters['factor']} already, which {factor} multiplies; "
            f"if max_position_embeddings={limit} is what it had before, as in LongLoRA's configs, correct it first",
            stacklevel=3,
        )
    parameters |= {"rope_type": kind, "factor": float(factor) * parameters.get("factor", 1.0)}
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", limit)
    return parameters
