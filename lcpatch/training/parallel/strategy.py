"""What every strategy is: attention of a rank's own queries over the whole row, and the bytes that this sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec

from ...core.registry import Registry
from ...hf.watch import Call
from .layout import Documents, Layout, Shard
from .link import Link

strategies: Registry[type[Strategy]] = Registry("parallel strategy", package="lcpatch.training.parallel")


@dataclass(frozen=True)
class Work:
    """One layer's attention over one batch: what a strategy plans from.

    Args:
        spec: the layer's pattern.
        num_kv_heads, head_dim: of the layer.
        layout, documents: the batch's, as in `Shard`.
        itemsize: bytes of a number of q, k and v.
    """

    spec: BlockSparseSpec
    num_kv_heads: int
    head_dim: int
    layout: Layout
    documents: Documents
    itemsize: int = 2

    @property
    def num_heads(self) -> int:
        return self.spec.num_heads

    @property
    def lse_size(self) -> int:
        """Bytes of a log-sum-exp: fp32, or float64 beside float64."""
        return max(4, self.itemsize)

    @classmethod
    def of(cls, call: Call, shard: Shard) -> Work:
        """The work of an attention call."""
        _, num_kv_heads, _, head_dim = call.key.shape
        return cls(call.spec, num_kv_heads, head_dim, shard.layout, shard.documents, call.key.element_size())


@dataclass(frozen=True)
class Volume:
    """Bytes that each rank sends, in a forward and in the backward."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


class Strategy(ABC):
    """A way for ranks that each hold a part of every row to attend over all of it. Holds no state of a batch."""

    name: ClassVar[str]

    @abstractmethod
    def attend(self, call: Call, shard: Shard, link: Link) -> tuple[Tensor, Tensor]:
        """`(out [B, H, t, D], lse [B, H, t])` of this rank's queries; both differentiable. A collective.

        Args:
            call: q [B, H, t, D] and k, v [B, K, t, D] of the rank's own t tokens; `bounds` is None.
            shard: which tokens of the whole row these are.
            link: the group.
        """

    @abstractmethod
    def volume(self, work: Work) -> Volume:
        """The bytes that `attend` and its backward send, from the same plan that they follow.

        Of the backward of both results: where nothing asks for the LSE's gradient, `ulysses` does not send it.
        """

    def problem(self, work: Work) -> str | None:
        """Why this strategy cannot serve the layer, or None."""
        return None


def flat(x: Tensor) -> Tensor:
    """[B, heads, t, D] -> [B * heads * t, D]."""
    return x.reshape(-1, x.shape[-1])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        total.index_add_(0, index.flatten(), grad.reshape(-1, *ctx.shape[1:]).to(wide))
        return total.to(grad.dtype), None


def take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`; gradients of a row that is taken several times, as one sent to several ranks, add up in fp32."""
    return _Take.apply(rows, index)


def bounds_tensor(rows: Sequence[Sequence[tuple[int, ...]]], columns: int, device: torch.device) -> Tensor:
    """int32 [B, N, columns] from each row's segments; short rows are filled with empty ones."""
    most = max(1, *(len(row) for row in rows)) if rows else 1
    filled = [[*(s[:columns] for s in row), *[(0,) * columns] * (most - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int32).to(device)
