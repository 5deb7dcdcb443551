"""What ranks with a piece of every weight compute beside one process. Each function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import EXACT, batch_of, loss_of, make_model, single, worst
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lcpatch.hf.models import unwrap
from lcpatch.training.parallel import parallelize
from lcpatch.training.parallel.trainer import group_of
from lcpatch.training.sharded import put_tensor, whole_tensor

BATCHES = ("packed", "whole")


def sharded(model: nn.Module) -> nn.Module:
    """The model as accelerate shards it: a unit a layer, and one for the rest."""
    for layer in unwrap(model).model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_everywhere(rank: int, cases: list[dict[str, Any]]) -> list[str]:
    """Gradients of two groups that share a batch of their own each, beside one process that sees all; the failures."""
    failures = []
    group = group_of(2)
    batches = [batch_of(kind) for kind in BATCHES]
    batch = batches[rank // 2][0]
    documents = [doc for _, docs in batches for doc in docs]
    items = sum(len(doc) - 1 for doc in documents)
    for case in cases:
        settings = ("llama", case.get("patch"), torch.float64, case.get("lora", False), case.get("checkpoint", False))
        want = single(make_model(*settings), documents)
        model = sharded(make_model(*settings))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        with parallelize(model, group, case["strategy"]) as ranks:
            ranks_of_all = dist.get_world_size()  # over which FSDP2 takes the mean
            loss = loss_of(model, ranks.shard(batch, num_items=items, data_ranks=ranks_of_all))
            loss.backward()
        total = loss.detach() / ranks_of_all
        dist.all_reduce(total)
        found = {n: whole_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        error = worst((total, found), want)
        if not error <= EXACT:
            failures.append(f"{case}: error {error:.1e}")
        if case is cases[0] and rank == 0:  # would another group's batch have been noticed?
            alone = single(make_model(*settings), batches[0][1])
            assert worst(alone, want) > 1e3 * EXACT
    return failures + moved()


def moved() -> list[str]:
    """Numbers that go into pieces, also of unequal size, come out as they went in."""
    failures = []
    for size in (1, 3, 8):
        layer = fully_shard(nn.Linear(2, size, bias=False))
        numbers = torch.arange(2.0 * size).view(size, 2) + 1
        put_tensor(layer.weight, numbers)
        if not torch.equal(whole_tensor(layer.weight), numbers):
            failures.append(f"{size} rows came back as {whole_tensor(layer.weight)}")
    return failures
