"""How far two ways to compute a model's logits may differ: measured, never typed in (`budget` does it for one op).

The yardstick is the rounding error of the same model, unpatched and with eager attention, in its own dtype.
"""

import copy

import torch
from torch import Tensor, nn

FACTOR = 8
"""Times the measured error: two sides err independently, and the worst of a few thousand entries varies by seed."""


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; inf where only one side is finite."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach().double(), b.detach().double()
    different = torch.where(a == b, 0.0, (a - b).abs())
    return float(different.nan_to_num(torch.inf).max())


def model_budget(model: nn.Module, ids: Tensor) -> float:
    """For the logits of an unpatched `model`: the error of a forward with eager attention against higher precision."""
    dtype = next(model.parameters()).dtype
    higher = torch.float64 if dtype == torch.float32 else torch.float32
    rough, exact = copy.deepcopy(model).eval(), copy.deepcopy(model).eval().to(higher)
    for m in (rough, exact):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        error = distance(rough(ids, use_cache=False).logits, exact(ids, use_cache=False).logits)
    assert error > 0, "higher precision changed nothing, so it measures nothing"
    return FACTOR * error
