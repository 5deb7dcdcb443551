"""Models whose linear layers hold int8, in the three forms that quantisation libraries have: what is read of a weight
(`weight.dtype`, `parameters()`) says nothing about the numbers that it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _rounded(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    return (linear.weight.detach() / scale).round().to(torch.int8), scale


class Int8Parameter(nn.Module):
    """As bitsandbytes': `weight` is an int8 parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        data, self.scale = _rounded(linear)
        self.weight, self.bias = nn.Parameter(data, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale.to(x), self.bias)


class Int8Buffers(nn.Module):
    """As GPTQ's and AWQ's: no `weight` and no parameters, but buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name, x in zip(("qweight", "scales"), _rounded(linear), strict=True):
            self.register_buffer(name, x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight * self.scales.to(x))


class Int8Tensor(Tensor):
    """As torchao's: a tensor made of others, which says that it is float and can do next to nothing."""

    def __new__(cls, data: Tensor, scale: Tensor) -> Int8Tensor:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.data8 * weight.scale.to(x), *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{function} of an Int8Tensor")


def _with_int8_tensor(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(Int8Tensor(*_rounded(linear)), requires_grad=False)
    return linear


KINDS = {"parameter": Int8Parameter, "buffers": Int8Buffers, "tensor": _with_int8_tensor}


def quantize(model: Any, kind: str) -> Any:
    """`model` with int8 in all linear layers but the head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, KINDS[kind](child))
    return model
