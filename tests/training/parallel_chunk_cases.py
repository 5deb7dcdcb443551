"""Chunks inside a rank beside one process: its chunkwise backward, and the plain one. Each function runs on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from models import tokens
from noise import FACTOR
from parallel_cases import (
    DOCUMENTS,
    EXACT,
    LENGTH,
    attend_everywhere,
    batch_of,
    gradients,
    make_model,
    run_all,
    single,
    specs,
    worst,
)
from schedules import positions_of
from torch import Tensor

from lcpatch.training import buffers, chunkwise
from lcpatch.training.parallel import parallelize
from lcpatch.training.parallel.layout import chunked
from lcpatch.training.parallel.strategy import Work, strategies

DEFAULTS = {"family": "llama", "patch": None, "lora": False, "checkpoint": False, "dtype": torch.float64}
DIM = 8


def chunk_works(num_ranks: int, heads: int, kv_heads: int) -> Iterator[tuple[Work, str]]:
    """A first, a middle and a last chunk, under every strategy that serves them."""
    edges = [0, 22, 44, 66, LENGTH]
    chunks = list(pairwise(edges))
    for spec in specs(heads, kv_heads).values():
        for documents in DOCUMENTS.values():
            for n in (1, 2, 4):
                seen = tuple(tuple((a, min(b, edges[n])) for a, b in row if a < edges[n]) for row in documents)
                work = Work(spec, kv_heads, DIM, chunked(chunks[:n], num_ranks), seen, 8)
                for strategy, cls in strategies.all().items():
                    if cls().problem(work) is None:
                        yield work, strategy


def labelled(kind: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A batch whose labels count for the same in every way to read them: no document's first token has one.

    "answer" has labels at its end only, and no documents for them to be those of.
    """
    if kind == "answer":
        ids = tokens(2, 61)
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(61) < 55, -100)}, []
    batch, docs = batch_of(kind)
    labels = batch["labels"].clone()
    if kind == "packed":
        labels[batch["position_ids"] == 0] = -100
    if kind in ("left", "right"):
        positions = positions_of(batch["attention_mask"])
        labels[positions == 0] = -100
        batch["position_ids"] = positions
    return {**batch, "labels": labels}, docs


def chunked_backward(model: Any, batch: dict[str, Tensor], size: int, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by `chunkwise.backward`, over all ranks where they share the model."""
    model.zero_grad(set_to_none=True)
    loss = chunkwise.backward(model, **batch, chunk_size=size, **more)
    return loss, gradients(model)


def over_ranks(
    model: Any, batch: dict[str, Tensor], size: int, strategy: Any, **more: Any
) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[int, str]]:
    """The same on all ranks, summed."""
    with parallelize(model, strategy=strategy) as ranks:
        loss, _ = chunked_backward(model, batch, size, **more)
        ranks.sum_gradients(model.parameters())
        return (ranks.total(loss), gradients(model)), ranks.chosen


def train_chunks(rank: int, cases: list[dict[str, Any]], device: str = "cpu") -> list[str]:
    """Each case's loss and gradients against one process's, plain and by chunks; the failures."""
    failures = []
    for case in cases:
        case = {**DEFAULTS, **case}
        batch, docs = labelled(case["batch"])
        batch, docs = {k: v.to(device) for k, v in batch.items()}, [doc.to(device) for doc in docs]
        make = [case[k] for k in ("family", "patch", "dtype", "lora", "checkpoint")]
        model = make_model(*make).to(device)
        alone = chunked_backward(model, batch, case["size"])
        want = single(model, docs) if docs else alone
        allowed = EXACT
        if case["dtype"] != torch.float64:
            make[2] = torch.float64 if case["dtype"] == torch.float32 else torch.float32
            allowed = FACTOR * worst(want, single(make_model(*make).to(device), docs))
        got, chosen = over_ranks(model, batch, case["size"], case["strategy"])
        errors = worst(got, want), worst(got, alone)
        if not max(errors) <= allowed:
            failures.append(f"{case}: errors {errors}, allowed {allowed:.1e}; {chosen}")
    return failures


def forgetting(rank: int) -> float:
    """The error where rank 1 loses what later chunks left for the keys of its earlier ones."""
    model, size = make_model("llama", None, torch.float64, lora=False, checkpoint=False), 20
    batch, _ = labelled("whole")
    want = chunked_backward(model, batch, size)
    add = buffers.DeviceStore.add
    if rank == 1:
        buffers.DeviceStore.add = lambda *args: None
    try:
        return worst(over_ranks(model, batch, size, "tokenring")[0], want)
    finally:
        buffers.DeviceStore.add = add


def spaco(rank: int) -> float:
    """The error of SpaCO, whose draw the first rank makes for all: here each would draw another."""
    model, size = make_model("llama", None, torch.float64, lora=True, checkpoint=True), 6
    batch, _ = labelled("whole")
    settings = {"estimator": "bernoulli", "keep": 0.5}
    want = chunked_backward(model, batch, size, generator=torch.Generator().manual_seed(0), **settings)
    mine = torch.Generator().manual_seed(rank)
    return worst(over_ranks(model, batch, size, "tokenring", generator=mine, **settings)[0], want)


def held(rank: int) -> dict[str, Any]:
    """Bytes of keys, values and gradients that this rank held, and two kappa a token of its share."""
    model, seen = make_model("llama", None, torch.float32, lora=False, checkpoint=False), []
    close = buffers.DeviceStore.close
    buffers.DeviceStore.close = lambda store: (seen.append(store.memory()["device"]), close(store))
    try:
        with parallelize(model) as ranks:
            chunked_backward(model, {"input_ids": tokens(1, 97), "labels": tokens(1, 97)}, 12)
            model.zero_grad(set_to_none=True)
            chunkwise.rehearse(model, length=97, chunk_size=12)
    finally:
        buffers.DeviceStore.close = close
    config = model.config
    kappa = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    share = 96 // ranks.size  # the last token predicts nothing
    return {"memory": seen[0], "two kappa": 2 * kappa * share, "rehearsed": gradients(model)}


def other_text(rank: int) -> None:
    """Rank 1 has read another batch."""
    model = make_model("llama", None, torch.float64, lora=False, checkpoint=False)
    with parallelize(model):
        chunked_backward(model, labelled("whole" if rank == 0 else "packed")[0], 16)


def run_chunks(rank: int, shapes: list[tuple[int, int]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about chunks."""
    works = [work for shape in shapes for work in chunk_works(dist.get_world_size(), *shape)]
    attention = attend_everywhere(rank, works)
    return {"attention": attention, "chunks": train_chunks(rank, cases), "spaco": spaco(rank), **held(rank)}


def run_on_gpu(rank: int, num_ranks: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The same over NCCL, a GPU a rank."""
    device = f"cuda:{rank}"
    return {
        "attention": attend_everywhere(rank, chunk_works(num_ranks, 8, 4), device),
        "chunks": train_chunks(rank, cases, device),
    }


def run_with_chunks(rank: int, shapes: list, cases: list[dict[str, Any]], chunks: list[dict[str, Any]]) -> dict:
    """`run_all`, and a few models by chunks."""
    return {**run_all(rank, shapes, cases), "chunks": train_chunks(rank, chunks), "control": forgetting(rank)}
