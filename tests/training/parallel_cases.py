"""What ranks compute beside one process: attention alone, and whole models. Each function runs on every rank."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from models import SHORT, build, tokens
from noise import FACTOR, distance
from peft import LoraConfig, get_peft_model
from schedules import pad, plain
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

import lcpatch
from lcpatch.hf.watch import Call
from lcpatch.patterns import LayerShape, patterns
from lcpatch.training.parallel import parallelize
from lcpatch.training.parallel.layout import Documents, Shard, make_layout
from lcpatch.training.parallel.link import Link
from lcpatch.training.parallel.strategy import Work, strategies
from lcpatch_kernels import BlockSparseSpec, Rule, block_sparse

LENGTH, DIM, BATCH = 75, 8, 2
EXACT = 1e-12  # of float64, whose own rounding here is below 1e-14

DOCUMENTS: dict[str, Documents] = {
    "whole": (((0, LENGTH),),) * 2,
    "packed": (((0, 20), (20, 27), (27, LENGTH)), ((0, LENGTH),)),
    "padded": (((13, LENGTH),), ((0, 60),)),
    "tiny": (((0, 1), (1, 2), (2, 3)), ((70, LENGTH),)),
}
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "shift": ("shift", {"group_size": 22}),
    "shift of a share": ("shift", {}),
    "sf": ("sf", {"group_size": 16, "num_sinks": 3}),
    "s2": ("s2", {"block_size": 16, "local_blocks": 1, "stride": 3, "sink_blocks": 0}),
    "s2 per query head": ("s2", {"block_size": 16, "local_blocks": 1, "stride": 2, "share": "query_head"}),
    "sink": ("sink", {"num_sinks": 2, "window": 9}),
    "rolled": ("shift", {"group_size": 22, "wrap": True}),
}


def specs(heads: int, kv_heads: int) -> dict[str, BlockSparseSpec]:
    """The patterns on a layer, dense attention, and rules that no pattern mixes."""
    shape = LayerShape(heads, kv_heads)
    found = {name: patterns.get(m).from_options(o).spec(shape) for name, (m, o) in PATTERNS.items()}
    odd = [
        Rule(),
        Rule(sinks=20, stride=3, residue=2, group=16, back=16),
        Rule(group=1, back=11),
        Rule(sinks=5, group=24, shifted=True, back=3),
    ]
    mixed = BlockSparseSpec.of([odd[h % 4] for h in range(heads)], 16)
    return {**found, "dense": BlockSparseSpec.of([Rule()] * heads), "mixed": mixed}


def attention_cases(num_ranks: int, shapes: list[tuple[int, int]]) -> Iterator[tuple[Work, str]]:
    """Every strategy on every layer and batch that it can serve."""
    for heads, kv_heads in shapes:
        for spec in specs(heads, kv_heads).values():
            for documents in DOCUMENTS.values():
                for name in ("contiguous", "head_tail", "per_document"):
                    alike = documents if name != "per_document" else documents[:1] * BATCH
                    work = Work(spec, kv_heads, DIM, make_layout(name, LENGTH, num_ranks, alike), alike, 8)
                    for strategy, cls in strategies.all().items():
                        if cls().problem(work) is None:
                            yield work, strategy


def attend_everywhere(rank: int, cases: Iterable[tuple[Work, str]], device: str = "cpu") -> tuple[int, list[str]]:
    """Output, LSE and every gradient against one process, and the bytes sent against the plan: `(cases, failures)`."""
    link, failures, count = Link(), [], 0
    link.gather([rank], torch.device(device))  # NCCL's communicator must not come about in a pairwise transfer
    want: dict[Any, list[Tensor]] = {}
    for work, name in cases:
        count += 1
        inputs, grads = ([t.to(device) for t in found] for found in _problem(work))
        key = (work.spec, work.num_kv_heads, work.documents, work.layout.begin)
        if key not in want:
            want[key] = _whole(work, inputs, grads)
        link.sent = 0
        got, forward = _part(work, name, rank, link, inputs, grads)
        mine = work.layout.tokens(rank).to(device)
        asked = mine[work.layout.num_before(rank) :]
        pairs = zip(got, want[key], [asked, asked, asked, mine, mine], strict=True)
        errors = [distance(g, w[:, :, places]) if g.numel() else 0.0 for g, w, places in pairs]
        volume = strategies.get(name)().volume(work)
        planned = volume.forward[rank], volume.backward[rank]
        if max(errors) > EXACT or (forward, link.sent - forward) != planned:
            sent = (forward, link.sent - forward)
            failures.append(f"{name}, {work.layout.name}, {key}: errors {errors}, sent {sent}, planned {planned}")
    return count, failures


def _problem(work: Work) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(work.num_heads)
    shapes = [(BATCH, h, LENGTH, DIM) for h in (work.num_heads, work.num_kv_heads, work.num_kv_heads, work.num_heads)]
    q, k, v, grad_out = (1.5 * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    grad_lse = torch.randn(shapes[0][:3], generator=g, dtype=torch.float64)
    for b, row in enumerate(work.documents):  # rows that see nothing have an LSE of -inf, and no gradient
        real = torch.zeros(LENGTH, dtype=torch.bool)
        for start, end in row:
            real[start:end] = True
        grad_lse[b, :, ~real] = 0
    for grad in (grad_out, grad_lse):
        grad[:, :, : work.layout.begin] = 0  # of queries that are not asked
    return [q, k, v], [grad_out, grad_lse]


def _whole(work: Work, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    x = [t.clone().requires_grad_() for t in inputs]
    most = max(map(len, work.documents))
    rows = [[[*d, *d] for d in row] + [[0] * 4] * (most - len(row)) for row in work.documents]
    bounds = torch.tensor(rows, dtype=torch.int32, device=x[0].device)
    # By the oracle, which shares no index arithmetic with what is tested.
    out, lse = block_sparse(*x, work.spec, bounds=bounds, softcap=2.0, impl="sdpa")
    torch.autograd.backward([out, lse], grads)
    return [out, lse, *(t.grad for t in x)]


def _part(
    work: Work, name: str, rank: int, link: Link, inputs: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], int]:
    mine = work.layout.tokens(rank).to(inputs[0].device)
    asked = mine[work.layout.num_before(rank) :]
    x = [t[:, :, places].clone().requires_grad_() for t, places in zip(inputs, (asked, mine, mine), strict=True)]
    call = Call(*x, work.spec, None, None, 2.0, "auto")
    out, lse = strategies.get(name)().attend(call, Shard(work.layout, work.documents, rank), link)
    forward = link.sent
    torch.autograd.backward([out, lse], [g[:, :, asked] for g in grads])
    return [out, lse, *(t.grad for t in x)], forward


# Whole models: (name, family, patch, strategy, layout, batch, options)
DOCS = [tokens(1, n, seed=n)[0] for n in (40, 26, 9)]


def batch_of(kind: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A whole batch of that kind, and its documents."""
    if kind == "packed":
        ids = torch.cat(DOCS)[None]
        positions = torch.cat([torch.arange(len(d)) for d in DOCS])[None]
        return {"input_ids": ids, "labels": ids, "position_ids": positions}, DOCS
    if kind == "flattened":
        ids = torch.cat(DOCS)[None]
        edges = torch.tensor([0, 40, 66, 75], dtype=torch.int32)
        return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": edges}, DOCS
    if kind == "whole":
        docs = [tokens(1, 43, seed=s)[0] for s in (1, 2)]
        ids = torch.stack(docs)
        return {"input_ids": ids, "labels": ids}, docs
    ids, mask = pad(DOCS, kind)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}, DOCS


def make_model(
    family: str, patch: dict[str, Any] | None, dtype: torch.dtype, lora: bool, checkpoint: bool
) -> nn.Module:
    """A model as a case wants it; the same on every rank."""
    model = build(family)
    if patch is not None:
        lcpatch.apply(model, **patch)
    if lora:
        torch.manual_seed(3)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model = model.to(dtype).train()
    if checkpoint:
        inner = model.get_base_model() if lora else model
        inner.enable_input_require_grads()
        enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def single(model: nn.Module, docs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process that sees each document by itself."""
    model.zero_grad(set_to_none=True)
    losses = [F.cross_entropy(plain(model, doc)[:-1], doc[1:], reduction="sum") for doc in docs]
    loss = sum(losses) / sum(len(doc) - 1 for doc in docs)
    loss.backward()
    return loss.detach(), gradients(model)


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A rank's loss: the model's own, but that transformers computes that in fp32 whatever the model is."""
    out = model(**inputs)
    if out.logits.dtype != torch.float64:
        return out.loss
    losses = F.cross_entropy(out.logits.flatten(0, 1), inputs["shift_labels"].flatten(), reduction="sum")
    return losses / inputs["num_items_in_batch"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The largest error of the loss and of every gradient, relative to its largest entry."""
    assert {n for n, g in got[1].items() if g.any()} == {n for n, g in want[1].items() if g.any()}
    errors = [distance(got[0], want[0]) / float(want[0])]
    errors += [distance(got[1][n], g) / float(g.abs().max()) for n, g in want[1].items() if g.any()]
    return max(errors)


def train_everywhere(rank: int, cases: list[dict[str, Any]]) -> list[str]:
    """Each case's loss and gradients, summed over the ranks, against one process; the failures."""
    failures = []
    for case in cases:
        case = {"family": "llama", "patch": None, "lora": False, "checkpoint": False, "dtype": torch.float64, **case}
        batch, docs = batch_of(case["batch"])
        make = [case[k] for k in ("family", "patch", "dtype", "lora", "checkpoint")]
        want = single(make_model(*make), docs)
        allowed = EXACT
        if case["dtype"] != torch.float64:
            make[2] = torch.float64 if case["dtype"] == torch.float32 else torch.float32
            exact = single(make_model(*make), docs)
            allowed = FACTOR * worst(want, exact)
        model = make_model(*[case[k] for k in ("family", "patch", "dtype", "lora", "checkpoint")])
        with parallelize(model, strategy=case["strategy"], layout=case.get("layout", "auto")) as ranks:
            loss = loss_of(model, ranks.shard(batch))
            during = nodes_alive()
            loss.backward()
            ranks.sum_gradients(model.parameters())
            got = ranks.total(loss), gradients(model)
            del loss
            after = nodes_alive()
            with torch.no_grad():
                again = ranks.total(loss_of(model, ranks.shard(batch)))
        error = worst(got, want)
        if not error <= allowed or distance(again, got[0]) > allowed:
            failures.append(f"{case}: error {error:.1e}, allowed {allowed:.1e}; {ranks.chosen}")
        if not during or after:
            failures.append(f"{case}: {during} nodes of the graph during a step, {after} after it")
    return failures


def nodes_alive() -> int:
    """Nodes of our own in autograd graphs that something still holds, with what they saved."""
    gc.collect()
    return sum(issubclass(type(x), BackwardCFunction) for x in gc.get_objects())


def balanced(rank: int) -> list[str]:
    """Sequences of mixed lengths as `balance.plan` spreads them: the gradients of plain data parallelism."""
    import torch.distributed as dist

    from lcpatch.training.parallel.balance import Costs, plan

    lengths = [75, 61, 27, 29, 5, 19, 35, 34, 28, 22]
    docs = [tokens(1, n, seed=n)[0] for n in lengths]
    found = plan(lengths, dist.get_world_size(), 40, Costs(square=1.0, linear=60.0))
    widths = {len(b.ranks) for b in found.batches}
    failures = [] if {1, 2} <= widths and len(set(found.counts())) > 1 else [f"dull plan: {found}"]
    for patch in ({"method": "sf", **SHORT["sf"]}, None):
        model = make_model("llama", patch, torch.float64, lora=True, checkpoint=True)
        want = single(model, docs)
        model.zero_grad(set_to_none=True)
        with parallelize(model) as ranks:
            total = torch.zeros((), dtype=torch.float64)
            for batch in found.of(rank):
                mine = [docs[n] for n in batch.sequences]
                ids = torch.cat(mine)[None]
                positions = torch.cat([torch.arange(len(d)) for d in mine])[None]
                whole = {"input_ids": ids, "labels": ids, "position_ids": positions}
                items = sum(n - 1 for n in lengths)
                loss = loss_of(model, ranks.shard(whole, num_items=items, members=batch.ranks))
                loss.backward()
                total += loss.detach()
            ranks.sum_gradients(model.parameters())
            error = worst((ranks.total(total), gradients(model)), want)
        if not error <= EXACT:
            failures.append(f"{patch}: error {error:.1e}")
    return failures


def wrong_shard(rank: int) -> None:
    """Rank 1 loses a token on the way."""
    model = build()
    with parallelize(model) as ranks:
        inputs = ranks.shard(batch_of("whole")[0])
        if rank == 1:
            inputs["input_ids"] = inputs["input_ids"][:, 1:]
            inputs["position_ids"] = inputs["position_ids"][:, 1:]
        model(**inputs)


def other_batch(rank: int) -> None:
    """Rank 1 has read another batch."""
    model = build()
    with parallelize(model) as ranks:
        model(**ranks.shard(batch_of("whole" if rank == 0 else "packed")[0]))


def dying_rank(rank: int) -> None:
    """Rank 1 dies in the middle of the forward's second layer."""
    model = build()
    with parallelize(model) as ranks:
        if rank == 1:
            model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(1))
        model(**ranks.shard(batch_of("whole")[0]))


def unchanged(rank: int) -> list[str]:
    """What leaving the context, or `lcpatch.remove`, leaves behind: nothing."""
    failures = []
    for patch in (None, {"method": "sf", **SHORT["sf"]}):
        for leave in ("context", "remove"):
            model = make_model("llama", patch, torch.float32, lora=False, checkpoint=False)
            ids = tokens(1, 20)
            before, keys = model(ids).logits, set(model.__dict__)
            saved = copy.deepcopy(model.state_dict())
            ranks = parallelize(model)
            assert model.state_dict().keys() == saved.keys()
            if leave == "remove":
                lcpatch.remove(model)
                fresh = make_model("llama", None, torch.float32, lora=False, checkpoint=False)
                before, keys = fresh(ids).logits, set(fresh.__dict__)
            else:
                ranks.close()
            if not torch.equal(model(ids).logits, before) or set(model.__dict__) != keys:
                failures.append(f"{patch}, {leave}: {set(model.__dict__) ^ keys}")
    return failures


def run_all(rank: int, shapes: list[tuple[int, int]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that needs all ranks alive."""
    import torch.distributed as dist

    attention = attend_everywhere(rank, attention_cases(dist.get_world_size(), shapes))
    return {"attention": attention, "training": train_everywhere(rank, cases), "unchanged": unchanged(rank)}


def run_others(rank: int) -> dict[str, Any]:
    """What needs four ranks, all of them alive."""
    return {"balanced": balanced(rank), "ring": torchs_ring(rank)}


def torchs_ring(rank: int) -> dict[str, Any]:
    """torch's own engine beside our ring, head and tail: the same output, and the bytes that each sends."""
    import torch.distributed as dist
    from torch.distributed._functional_collectives import permute_tensor
    from torch.distributed.tensor.experimental._context_parallel import _attention

    from lcpatch.bench.parallel import torchs_ring as counted

    ranks, heads, length, dim = dist.get_world_size(), 4, 64, 16
    documents = (((0, length),),)
    work = Work(
        BlockSparseSpec.of([Rule()] * heads),
        heads,
        dim,
        make_layout("head_tail", length, ranks, documents),
        documents,
        4,
    )
    mine = work.layout.tokens(rank)
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, length, dim, generator=g) for _ in range(3)]
    q, k, v = (x[:, :, mine].contiguous() for x in whole)
    sdpa = F.scaled_dot_product_attention
    exact = sdpa(*(x.double() for x in whole), is_causal=True)
    allowed = FACTOR * distance(sdpa(*whole, is_causal=True), exact)
    sent = 0

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal sent
        sent += x.numel() * x.element_size()
        return permute_tensor(x, *args, **kwargs)

    _attention._cp_options.enable_load_balance = True
    _attention.set_rotate_method("alltoall")
    _attention.ft_c.permute_tensor = counting
    engine = _attention._templated_ring_attention
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    theirs = engine(dist.group.WORLD, 2, op, q, k, v, is_causal=True)[0]
    link = Link()
    ours, _ = strategies.get("ring")().attend(
        Call(q, k, v, work.spec, None, None, None, "auto"), Shard(work.layout, documents, rank), link
    )
    # Ours in bf16 counts half the bytes of fp32.
    error = max(distance(x, exact[:, :, mine]) for x in (ours, theirs))
    return {"error": error, "allowed": allowed, "theirs": sent, "counted": 2 * counted(work)[rank], "ours": link.sent}
