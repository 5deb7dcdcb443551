"""Context parallelism over NCCL: exact in float64 on every GPU there is, and a whole model on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import SHORT, build
from noise import FACTOR, distance, model_budget
from parallel_cases import attend_everywhere, attention_cases, batch_of
from world import run_world

import lcpatch
from lcpatch.training.parallel import parallelize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("num_ranks", sorted({2, torch.cuda.device_count()}))
def test_every_strategy_over_nccl(num_ranks: int):
    for count, failures in run_world(num_ranks, attend_on_gpu, num_ranks, timeout=500, backend="nccl"):
        assert count > 100
        assert not failures, "\n".join(failures[:5])


def attend_on_gpu(rank: int, num_ranks: int) -> tuple[int, list[str]]:
    return attend_everywhere(rank, attention_cases(num_ranks, [(8, 4)]), f"cuda:{rank}")


@pytest.mark.parametrize("strategy", ["auto", "halo", "ring", "ulysses"])
@pytest.mark.parametrize("patch", [None, {"method": "sf", **SHORT["sf"], "mode": "always"}])
def test_a_model_on_one_gpu(patch, strategy: str):
    """The kernels on shards, documents apart."""
    if patch and strategy == "ring":
        pytest.skip("for dense layers")
    batch, docs = batch_of("packed")
    batch = {k: v.cuda() for k, v in batch.items()}
    model = build()
    allowed = FACTOR * model_budget(model, batch["input_ids"].cpu())
    model = model.cuda()
    if patch:
        lcpatch.apply(model, **patch)
    with torch.no_grad():
        want = torch.cat([model(doc[None].cuda(), use_cache=False).logits[0] for doc in docs])
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad(), parallelize(model, strategy=strategy) as ranks:
            got = model(**ranks.shard(batch)).logits[0]
    finally:
        dist.destroy_process_group()
    assert distance(got, want) <= allowed
