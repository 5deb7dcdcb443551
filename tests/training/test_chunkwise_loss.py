"""The summed cross-entropy of a few rows at a time: value, gradients, heads of every kind, and memory."""

import pytest
import torch
from chunkwise_cases import far
from torch import nn
from torch.nn import functional as F

from lcpatch.training import loss as module
from lcpatch.training.loss import summed_cross_entropy

VOCAB = 301


class Head(nn.Module):
    """A head with what families put behind it: LoRA-like extra weights, a scale and a softcap."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(24, VOCAB, dtype=dtype)
        self.extra = nn.Linear(24, VOCAB, bias=False, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(VOCAB, dtype=dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits = (self.linear(rows) + 0.5 * self.extra(rows)) * self.frozen
        return 5 * torch.tanh(logits / 5)


def problem(dtype: torch.dtype, rows: int = 333):
    torch.manual_seed(0)
    hidden = torch.randn(2, rows, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB, (2, rows))
    targets[0, ::3] = -100
    targets[1, 100:] = -100
    return Head(dtype), hidden, targets


def results(total: torch.Tensor, head: nn.Module, hidden: torch.Tensor):
    (0.25 * total).backward()
    grads = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    return total.detach(), {**grads, "hidden": hidden.grad}


def whole(dtype: torch.dtype, computed_in: torch.dtype | None = None):
    """Everything at once, of numbers of `dtype`; the unused parameter's gradient a zero."""
    head, hidden, targets = problem(dtype)
    if computed_in is not None:
        head, hidden = head.to(computed_in), hidden.detach().to(computed_in).requires_grad_()
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return results(total + 0 * head.unused.sum(), head, hidden)


def blocks(dtype: torch.dtype):
    head, hidden, targets = problem(dtype)
    return results(summed_cross_entropy(head, hidden, targets, list(head.parameters()), VOCAB), head, hidden)


def test_value_and_gradients_in_double_precision():
    (got, grads), (want, expected) = blocks(torch.float64), whole(torch.float64)
    eps = torch.finfo(torch.float64).eps
    assert abs(got - want) <= 333 * eps * want
    assert far(grads, expected) <= 333 * eps  # sums of as many rows, in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_errs_no_more_than_everything_at_once(dtype: torch.dtype):
    """Weights' gradients are summed over blocks in fp32."""
    exact, (got, grads), (rough, coarse) = whole(dtype, torch.float64), blocks(dtype), whole(dtype)
    assert got.dtype == torch.float32
    assert abs(got - exact[0]) <= 2 * abs(rough - exact[0]) + 333 * torch.finfo(torch.float32).eps * rough
    for name, want in exact[1].items():
        error, budget = (float((x[name] - want).abs().max()) for x in (grads, coarse))
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * float(want.abs().max()), name


def test_only_labelled_rows_reach_the_head_and_few_at_a_time():
    head, hidden, targets = problem(torch.float32)
    seen = []
    summed_cross_entropy(lambda x: seen.append(x.shape[1]) or head(x), hidden, targets, list(head.parameters()), VOCAB)
    assert sum(seen) == int((targets != -100).sum())
    assert max(seen) == module.CPU_ROWS


def test_no_label_gives_zero_and_zeros():
    head, hidden, targets = problem(torch.float32)
    total, grads = results(
        summed_cross_entropy(head, hidden, torch.full_like(targets, -100), list(head.parameters()), VOCAB), head, hidden
    )
    assert total == 0
    assert not any(g.any() for g in grads.values())


def test_without_gradients_nothing_is_kept():
    head, hidden, targets = problem(torch.float32)
    with torch.no_grad():
        total = summed_cross_entropy(head, hidden, targets, list(head.parameters()), VOCAB)
    assert not total.requires_grad
    assert total == pytest.approx(float(whole(torch.float32)[0]), rel=1e-5)
