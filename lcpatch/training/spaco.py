"""SpaCO: which chunks are visited again, and how much of the gradient each stands for.

Source: arXiv 2505.16710, section 4. Departures: the paper draws t of k chunks without replacement, scales injected
gradients by k/t and leaves the loss unscaled, and calls that unbiased. A chain through p chunks survives such a draw
with probability prod_{i<p} (t-i)/(k-i), not (t/k)^p, so its estimator favours short chains. Here each chunk is kept
independently, and all that leaves it, its loss and its injected gradient, is divided by its probability: the
expectation over all outcomes is exactly SeCO's gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

ESTIMATORS = ("seco", "bernoulli", "paper")


@dataclass(frozen=True)
class Plan:
    """What the second pass does with each chunk, first to last.

    Args:
        kept: whether it is run again at all.
        loss: factor of its own loss.
        hop: factor of the gradient that later chunks left for it.
    """

    kept: tuple[bool, ...]
    loss: tuple[float, ...]
    hop: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that the parts speak of the same chunks."""
        if not len(self.kept) == len(self.loss) == len(self.hop):
            raise ValueError(f"a plan of {len(self.kept)} chunks has {len(self.loss)} losses and {len(self.hop)} hops")


def seco(num_chunks: int, hop: float = 1.0) -> Plan:
    """Every chunk: the exact gradient. Another `hop` weighs a chain through p chunks by hop ** (p - 1)."""
    return Plan((True,) * num_chunks, (1.0,) * num_chunks, (hop,) * num_chunks)


def bernoulli(outcome: Sequence[bool], keep: float | Sequence[float]) -> Plan:
    """The unbiased estimate that belongs to one outcome of the coins.

    Args:
        outcome: which chunks came up.
        keep: their probabilities, or one for all, in (0, 1].

    Raises:
        ValueError: a probability outside of (0, 1], or not one a chunk.
    """
    probabilities = _probabilities(keep, len(outcome))
    scale = tuple(1 / p for p in probabilities)
    return Plan(tuple(map(bool, outcome)), scale, scale)


def paper(outcome: Sequence[bool]) -> Plan:
    """The published estimator for one draw of t of k chunks: hops scaled by k/t, the loss as it is. Biased.

    Relative bias of the gradient by exact enumeration, a tiny Llama, k = 6, t = 1 to 5: .91 .74 .56 .37 .19 (the
    Bernoulli estimator with p = t/k: 0, at a standard deviation of 4.9 2.3 1.4 .93 .56 of the gradient's norm). On
    SmolLM2-135M, k = 8, t = 2, 4, 6: .81 .55 .27.
    """
    count = sum(map(bool, outcome))
    if count == 0:
        raise ValueError("estimator='paper' visits at least one chunk")
    return Plan(tuple(map(bool, outcome)), (1.0,) * len(outcome), (len(outcome) / count,) * len(outcome))


def draw(
    estimator: str, num_chunks: int, keep: float | Sequence[float], generator: torch.Generator | None = None
) -> Plan:
    """A plan by name, its chunks drawn.

    Args:
        estimator: "seco" (all chunks), "bernoulli" (each with probability `keep`, unbiased) or "paper" (the nearest
            whole number to keep * num_chunks of them, at least one; biased, see `paper`).
        num_chunks: chunks of the sequence.
        keep: probability for all, or one a chunk ("bernoulli").
        generator: CPU generator; default: torch's own.

    Raises:
        ValueError: an unknown estimator, or a `keep` that does not fit.
    """
    if estimator == "seco":
        if keep != 1:
            raise ValueError(f"keep={keep} with estimator='seco', which keeps every chunk: take 'bernoulli'")
        return seco(num_chunks)
    if estimator == "bernoulli":
        probabilities = _probabilities(keep, num_chunks)
        coins = torch.rand(num_chunks, generator=generator, dtype=torch.float64).tolist()
        return bernoulli([coin < p for coin, p in zip(coins, probabilities, strict=True)], probabilities)
    if estimator == "paper":
        share = _probabilities(keep, 1)[0]
        chosen = torch.randperm(num_chunks, generator=generator)[: max(1, round(share * num_chunks))].tolist()
        return paper([n in chosen for n in range(num_chunks)])
    raise ValueError(f"estimator={estimator!r} is not one of {', '.join(ESTIMATORS)}")


def coins(*place: int) -> torch.Generator:
    """What `draw` takes its random numbers from at one place of a run, such as seed, step and rank.

    The same whenever and by whomever it is asked for; of another place, unrelated (neighbouring seeds may not be).
    """
    digest = hashlib.sha256(repr(place).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def chain_norms(model: nn.Module, *, input_ids: torch.Tensor, labels: torch.Tensor, chunk_size: int, **kwargs: Any):
    """How much of the gradient comes through chains of p chunks: what a cap, or a low `keep`, would lose.

    A loss reaches a parameter through its own chunk, or by the keys that this read of an earlier chunk, and so on: g is
    the sum over p of z_p, the part whose chains touch p chunks. SeCO with hops scaled by s gives
    G(s) = sum_p s^(p-1) z_p, so k values of s give every z_p. Costs k backward passes and k copies of the gradient; the
    model's `.grad` is left as it was found.

    Args:
        model, input_ids, labels, chunk_size, **kwargs: as `chunkwise.backward` takes them. Use float32 or float64, and
            no dropout: the parts come out of differences.

    Returns:
        `(norms, shares)`: lists over p = 1 to k of |z_p| and of the cosine between g and the sum of z_1 to z_p.
    """
    from .chunkwise import backward

    before = {p: p.grad for p in model.parameters()}
    runs: list[torch.Tensor] = []

    def run(scale: float) -> int:
        for p in before:
            p.grad = None
        counts: list[int] = []

        def plan(num_chunks: int) -> Plan:
            counts.append(num_chunks)
            return seco(num_chunks, scale)

        backward(model, input_ids=input_ids, labels=labels, chunk_size=chunk_size, estimator=plan, **kwargs)
        runs.append(torch.cat([p.grad.flatten().double().cpu() for p in before if p.grad is not None]))
        return counts[0]

    try:
        num_chunks = run(1.0)
        scales = [1.0, *(1 - 2 * n / num_chunks for n in range(1, num_chunks))]  # in (-1, 1]: powers stay apart
        for scale in scales[1:]:
            run(scale)
    finally:
        for p, grad in before.items():
            p.grad = grad
    powers = torch.tensor([[s**p for p in range(num_chunks)] for s in scales], dtype=torch.float64)
    parts = torch.linalg.solve(powers, torch.stack(runs))
    whole = runs[0]
    cosines = torch.nn.functional.cosine_similarity(parts.cumsum(0), whole[None], dim=-1)
    return parts.norm(dim=-1).tolist(), cosines.tolist()


def _probabilities(keep: float | Sequence[float], num_chunks: int) -> list[float]:
    values = [float(keep)] * num_chunks if isinstance(keep, (int, float)) else [float(p) for p in keep]
    if len(values) != num_chunks:
        raise ValueError(f"keep has {len(values)} probabilities, but the sequence has {num_chunks} chunks")
    if bad := [p for p in values if not 0 < p <= 1]:
        raise ValueError(f"keep={bad[0]} must be a probability in (0, 1]: 1 keeps every chunk, which is SeCO")
    return values
