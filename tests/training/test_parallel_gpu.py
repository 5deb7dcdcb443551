"""Context parallelism over NCCL: exact in float64 on every GPU there is, and a whole model on one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from models import SHORT, build
from noise import FACTOR, distance, model_budget
from parallel_cases import attend_everywhere, attention_cases, batch_of
from parallel_chunk_cases import run_on_gpu
from test_chunkwise_gpu import chunks, error, gradient, ids, make, plain
from test_parallel import CHUNKS, MORE_CHUNKS
from world import run_world

import lcpatch
from lcpatch.training import spaco
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("num_ranks", sorted({2, torch.cuda.device_count()}))
def test_chunks_inside_a_rank_over_nccl(num_ranks: int):
    exact = [case for case in CHUNKS + MORE_CHUNKS if case.get("dtype", torch.float64) == torch.float64]
    cases = [case for case in exact if case["size"] >= num_ranks]
    for answer in run_world(num_ranks, run_on_gpu, num_ranks, cases, timeout=500, backend="nccl"):
        count, failures = answer["attention"]
        assert count > 100
        assert not failures, "\n".join(failures[:5])
        assert not answer["chunks"], "\n".join(answer["chunks"])


@pytest.mark.parametrize(("patch", "strategy"), [(None, "tokenring"), (None, "ring"), ("sf", "halo"), ("s2", "halo")])
def test_chunks_inside_one_rank_in_bf16(patch: str | None, strategy: str):
    """Through the kernels, against their own budget: a plain backward of the same model."""
    model, tokens = make(), ids(1301, 2)
    if patch is not None:
        lcpatch.apply(model, patch, **SHORT[patch])
    exact = gradient(copy.deepcopy(model).float(), plain(tokens, tokens))
    budget = 2 * error(gradient(model, plain(tokens, tokens)), exact)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with parallelize(model, strategy=strategy):
            assert error(gradient(model, chunks(tokens, tokens, chunk_size=256)), exact) <= budget
            first = gradient(model, chunks(tokens, tokens, chunk_size=256, estimator=lambda k: spaco.seco(k, hop=0.0)))
    finally:
        dist.destroy_process_group()
    assert error(first, exact) > budget


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
