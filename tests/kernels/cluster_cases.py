"""Inputs of `cluster_merge` that the interpreter's and the GPU's tests share, and how its two halves are judged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lcpatch_kernels.cluster_merge import num_merged, reference

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(
    slots: int = 203,
    *,
    pads: tuple[int, ...] = (0, 37),
    kv_heads: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """`(k, v, size)`, a row for each number of left pads; sizes 1 … 5. What pads hold is NaN: nobody may read it."""
    rng = torch.Generator(device).manual_seed(seed)
    shape = (len(pads), kv_heads, slots)
    k, v = (
        (torch.randn(*shape, head_dim, generator=rng, device=device, dtype=torch.float64) * 1.5 + 0.3).to(dtype)
        for _ in range(2)
    )
    size = torch.randint(1, 6, shape, generator=rng, device=device).float()
    for row, count in enumerate(pads):
        size[row, :, :count], k[row, :, :count], v[row, :, :count] = 0, torch.nan, torch.nan
    return k, v, size


def assert_matches(k: Tensor, size: Tensor, chunk: int, merges: int, target: Tensor) -> None:
    """Whether `target` is a best matching of every chunk, judged in float64.

    Cosines that differ by less than the rounding of fp32 sums over D terms may be told apart either way.
    """
    slack = 2 * (k.shape[-1] + 4) * torch.finfo(torch.float64 if k.dtype == torch.float64 else torch.float32).eps
    for row in range(k.shape[0]):
        for head in range(k.shape[1]):
            for first in range(0, k.shape[2], chunk):
                here = slice(first, min(first + chunk, k.shape[2]))
                _assert_chunk(
                    k[row, head, here].double().cpu(),
                    (size[row, head, here] > 0).cpu(),
                    merges * (here.stop - first) // chunk,
                    (target[row, head, here].long() - first // chunk * (chunk - merges)).cpu(),
                    slack,
                )


def _assert_chunk(k: Tensor, real: Tensor, gives: int, target: Tensor, slack: float) -> None:
    gone = target < 0  # -1 in the first chunk, less in others
    pads = (~real).nonzero()[:, 0]
    assert torch.equal(gone.nonzero()[:, 0], pads[: min(gives, len(pads))]), "the first pads go, and nothing else"
    left = len(target) - gives
    order = target[~gone]
    assert set(order.tolist()) == set(range(left)), "every output slot is filled"
    keys = torch.arange(len(target))
    stays = torch.ones_like(gone)
    joins = []
    cosine = normalize(k.nan_to_num(), dim=-1) @ normalize(k.nan_to_num(), dim=-1).T
    for slot in range(left):
        members = keys[target == slot]
        if len(members) == 1:
            continue
        b = members[members % 2 == 1]
        assert len(b) == 1, "a cluster is one b and some a's"
        assert real[members].all(), "a pad never matches"
        joins += [(int(a), int(b)) for a in members if a % 2 == 0]
    for a, b in joins:
        stays[a] = False
        assert cosine[a, b] >= cosine[a, 1::2][real[1::2]].max() - slack, "an a joins its most similar b"
    assert len(joins) == gives - int(gone.sum())
    kept_a = [a for a in range(0, len(target), 2) if real[a] and stays[a]]
    if joins and kept_a and real[1::2].any():
        worst = min(cosine[a, b] for a, b in joins)
        assert worst >= cosine[kept_a][:, 1::2][:, real[1::2]].max(1).values.max() - slack, "the best edges are kept"
    stays &= ~gone
    assert (target[stays].diff() > 0).all(), "order is kept"


def assert_merges(inputs: Inputs, target: Tensor, got: Inputs, chunk: int, merges: int, weighted: bool = True) -> None:
    """The means against the reference in float64: what storing and fp32 sums over a chunk round."""
    k, v, size = inputs
    num_out = k.shape[2] - num_merged(k.shape[2], chunk, merges)
    want = reference.merge(k.double(), v.double(), size, target, num_out, chunk, merges, weighted)
    eps = torch.finfo(k.dtype).eps + 2 * chunk * torch.finfo(torch.float32).eps * (k.dtype != torch.float64)
    for g, w, x in zip(got[:2], want[:2], (k, v), strict=True):
        assert (g.double() - w).abs().max() <= eps * x.double().nan_to_num().abs().max()
    assert torch.equal(got[2], want[2])
