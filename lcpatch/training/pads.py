"""What a model makes of pads that a chunk cannot repeat, because it is of the whole row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedModelError
from .loss import IGNORE
from .text import Text


def check_pads(base: Any, text: Text) -> None:
    """Refuse a text whose pads mean another thing in chunks.

    Raises:
        UnsupportedModelError: positions that follow the pads among the tokens.
        ValueError: a pad that sees what follows it, and predicts a label.
    """
    if text.positions is None and _counts_by_pads(base, text):
        raise UnsupportedModelError(
            f"{base.config.model_type} counts positions by the pads it finds in input_ids, and a chunk does not see "
            "those before it; pass position_ids"
        )
    if text.mask is not None and _sees_all(base) and _predicts(text.mask, text.targets):
        raise ValueError(
            "labels: a pad before a text predicts its first token, and in this model, or under "
            "attn_implementation='eager', a pad attends to the whole row, of which a chunk sees a part; set the first "
            "token's label to -100"
        )


def _counts_by_pads(base: Any, text: Text) -> bool:
    """Whether positions depend on pads among the tokens, as in RoBERTa's kin, and there are some."""
    return any(
        hasattr(module, "create_position_ids_from_input_ids") and bool((text.ids == module.padding_idx).any())
        for module in base.modules()
    )


def _sees_all(base: Any) -> bool:
    """Whether a token that may see nothing sees everything alike: a softmax of the same scores, without a sink."""
    modules = list(base.modules())
    num_sinks = sum(getattr(module, "sinks", None) is not None for module in modules)
    adds = any(hasattr(module, "prepare_dynamic_mask") for module in modules)  # Doge's mask is added, not said
    return (adds or base.config._attn_implementation == "eager") and num_sinks < base.config.num_hidden_layers


def _predicts(mask: Tensor, targets: Tensor) -> bool:
    """Whether a pad before any token has a label."""
    before = mask.cpu().cumsum(-1) == 0
    return bool((before & targets.cpu().ne(IGNORE)).any())
