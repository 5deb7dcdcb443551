"""Run a model on a group of ranks that each hold a part of every row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcpatch_kernels import DENSE, BlockSparseSpec

from ...core.errors import ParallelError
from ...hf.head import decoder_of
from ...hf.layers import head_dim_of, num_kv_heads_of, state_of
from ...hf.models import attention_modules, unwrap
from ...hf.registration import NAME
from ...hf.route import route, unroute
from ...hf.state import ON_REMOVE
from ...hf.watch import Call
from .alive import pulse_of
from .batch import documents_of, ids_of, shard_batch
from .cost import Rates, choose, quickest_layout
from .layout import Shard, per_document
from .link import Link
from .strategy import Strategy, Work, strategies

logger = logging.getLogger(__name__)
BUCKET = 1 << 26  # numbers that are summed over the ranks at once


def parallelize(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    strategy: str | Sequence[str] = "auto",
    layout: str = "auto",
    rates: Rates | None = None,
) -> Parallel:
    """Let `model`'s attention reach over all ranks of `group`, each of which runs it on its part of every row.

    Weights, modules and what is saved stay as they are. A model is patched first and parallelized then; leaving the
    returned context, or `lcpatch.remove(model)`, takes this off again. A collective: all ranks of the group call it.

        with parallelize(model, group) as ranks:
            loss = model(**ranks.shard(batch)).loss     # `batch` is the whole one, on every rank
            loss.backward()
            ranks.sum_gradients(model.parameters())

    Args:
        model: a causal LM of transformers, patched or not, or a PEFT model around one.
        group: the ranks; None: all.
        strategy: "auto" (per layer the one that the cost model finds fastest), a name, or names in order of preference:
            a layer takes the first that can serve it.
        layout: which rank holds which tokens: "contiguous", "head_tail", "per_document"; "auto": where a layer has a
            pattern, the first or the second, by the cost model; else what balances dense attention.
        rates: bandwidth and arithmetic that "auto" reckons with; equal on all ranks.

    Raises:
        ParallelError: torch.distributed is not initialised, the model is parallelized already, or its ranks would not
            compute what one process does (rotary embeddings that follow the length; an auxiliary loss of routers).
        UnknownNameError: no such strategy.
        UnsupportedModelError: a model whose attention cannot be exchanged.
    """
    return Parallel(model, group, strategy, layout, rates or Rates())


class Parallel:
    """A parallelized model's group; see `parallelize`.

    Attributes:
        link: this process's end of the group; `link.sent` counts the bytes sent.
        rank, size: of the group.
        chosen: what each layer's attention runs and why, by layer index; filled by the first forward.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None,
        strategy: str | Sequence[str],
        layout: str,
        rates: Rates,
    ) -> None:
        base = unwrap(model)
        if ON_REMOVE in base.__dict__:
            raise ParallelError("this model is parallelized already; leave that context or lcpatch.remove(model) first")
        _refuse_model(base.config)
        names = [strategy] if isinstance(strategy, str) else list(strategy)
        self._wanted = None if names == ["auto"] else [strategies.get(name)() for name in names]
        self._layout, self._rates = layout, rates
        self.link = Link(group)
        self.rank, self.size = self.link.rank, self.link.size
        self.chosen: dict[int, str] = {}
        self._choices: dict[Work, tuple[Strategy, str]] = {}
        self._model, self._routed = model, base.config._attn_implementation != NAME
        self._modules = route(model) if self._routed else attention_modules(base)
        for module in self._modules.values():
            state_of(module).parallel = self
        self._hook = decoder_of(base).register_forward_pre_hook(_refuse_mask, with_kwargs=True)
        self._checked: Shard | None = None
        setattr(base, ON_REMOVE, self.close)
        self.link.pulse = pulse_of(self.link.group)
        # Also makes NCCL's communicator, which may not come about in a pairwise transfer that only some take part in.
        self.link.gather([self.rank], _meeting_place(self.link.group, base))

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        base = unwrap(self._model)
        if base.__dict__.pop(ON_REMOVE, None) is None:
            return
        self._hook.remove()
        for module in self._modules.values():
            if (state := state_of(module)) is not None:
                state.parallel = None
        if self._routed:
            unroute(self._model)
        if self.link.pulse is not None:
            self.link.pulse.stop()

    def shard(
        self,
        batch: Mapping[str, Any],
        num_items: int | Tensor | None = None,
        data_ranks: int = 1,
        members: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """This rank's part of a whole batch, as arguments of the model; see `batch.shard_batch`.

        Args:
            batch, num_items, data_ranks: as there.
            members: only these ranks of the group share the batch (as `balance.plan` says), and only they call the
                model on it; several such batches may be under way at once.

        Raises:
            ParallelError: a batch that cannot be cut, or that is not this rank's.
        """
        layout = self._layout_of(batch, self.size if members is None else len(set(members)))
        if members is None:
            return shard_batch(batch, self.rank, self.size, layout, num_items, data_ranks)
        chosen = tuple(sorted(members))
        if self.rank not in chosen:
            raise ParallelError(f"rank {self.rank} is not among the ranks {list(chosen)} that share this batch")
        return shard_batch(batch, chosen.index(self.rank), len(chosen), layout, num_items, data_ranks, chosen)

    def pool(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The batches of all ranks, by rank, where each has read one of its own; a collective."""
        found: list[dict[str, Any]] = [{} for _ in range(self.size)]
        here = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}
        with self.link.named():
            dist.all_gather_object(found, here, group=self.link.group)
        return found

    def total(self, loss: Tensor) -> Tensor:
        """The whole batch's loss from this rank's, detached; a collective."""
        loss = loss.detach().clone()
        self.link.add(loss)
        return loss

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sums over the ranks; a collective, unless a host such as DDP does it."""
        held = [p for p in parameters if p.requires_grad]
        for p in held:
            if p.grad is None:  # an expert that no token of this rank chose
                p.grad = torch.zeros_like(p)
        while held:
            bucket, size = [], 0
            while held and held[-1].dtype == (bucket or held)[-1].dtype and (not bucket or size < BUCKET):
                size += held[-1].numel()
                bucket.append(held.pop())
            together = torch.cat([p.grad.flatten() for p in bucket])
            self.link.add(together)
            for p, grad in zip(bucket, together.split([p.numel() for p in bucket]), strict=True):
                p.grad.copy_(grad.view_as(p))

    def attend(self, layer: int, call: Call, shard: Shard | None) -> tuple[Tensor, Tensor]:
        """Attention of one layer; called by `hf.attention`."""
        link = self.link if shard is None or shard.members is None else self.link.among(shard.members)
        if shard is None or shard is not self._checked:
            self._check(call, shard, link)
        work = Work.of(call, shard)
        if work not in self._choices:
            self._choices[work] = self._choose(layer, work)
        strategy, why = self._choices[work]
        if layer not in self.chosen:
            self.chosen[layer] = f"{strategy.name}: {why}"
            logger.info("layer %d: %s", layer, self.chosen[layer])
        return strategy.attend(call, shard, link)

    def _choose(self, layer: int, work: Work) -> tuple[Strategy, str]:
        if len(self._choices) > 4096:  # packed batches differ every time
            self._choices.clear()
        if self._wanted is None:
            choice = choose(work, self._rates)
            return strategies.get(choice.name)(), choice.why
        problems = {s.name: s.problem(work) for s in self._wanted}
        for s in self._wanted:
            if problems[s.name] is None:
                return s, "as asked"
        told = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise ParallelError(f"layer {layer} cannot run under strategy={list(problems)}: {told}")

    def _layout_of(self, batch: Mapping[str, Any], ranks: int) -> str:
        if self._layout != "auto":
            return self._layout
        takes = [s.name for s in self._wanted or []]
        if takes[:1] == ["lightseq"]:
            return "contiguous"
        length, documents = ids_of(batch, ranks).shape[1], documents_of(batch)
        layers = [self._layer(index, module) for index, module in self._modules.items()]
        if takes[:1] != ["halo"] and all(set(spec.rules) == {DENSE} for spec, _, _ in layers):
            alike = len(set(documents)) == 1 and all(per_document(documents[0], length, ranks).runs)
            return "per_document" if alike else "contiguous"
        itemsize = unwrap(self._model).dtype.itemsize
        return quickest_layout(layers, length, ranks, documents, itemsize, self._rates, takes)

    def _layer(self, index: int, module: nn.Module) -> tuple[BlockSparseSpec, int, int]:
        state = state_of(module)
        return state.active_spec(module) or state.own, num_kv_heads_of(module.config, index), head_dim_of(module)

    def _check(self, call: Call, shard: Shard | None, link: Link) -> None:
        """Before a batch's first exchange, and on every rank alike: are these parts of one batch, and one plan?"""
        rows, _, tokens, _ = call.query.shape
        plan = hash((*call.spec.to_ints(), *astuple(self._rates))) & (2**62 - 1)
        mine = [int(shard is not None), rows, tokens, plan, 0 if shard is None else shard.digest()]
        found = link.gather(mine, call.query.device)
        for rank, (whole, _, _, plan, digest) in enumerate(found):
            if not whole:
                raise ParallelError(
                    f"rank {rank} called the model without a shard; every rank calls it with **ranks.shard(batch). If "
                    "yours did, this model does not pass its keyword arguments on to its attention: it cannot be "
                    "parallelized"
                )
            if plan != found[0][3]:
                raise ParallelError(
                    f"rank {rank} runs another pattern than rank 0, or reckons with other rates, and would exchange "
                    "other keys: have the model in one mode on all ranks (train or eval), and give all the same rates"
                )
            if digest != found[0][4]:
                raise ParallelError(f"rank {rank} holds a part of another batch than rank 0; shard one batch on all")
        for rank, (_, rows, tokens, *_) in enumerate(found):
            layout = shard.layout
            if tokens != layout.num_queries(rank) or rows != len(shard.documents):
                raise ParallelError(
                    f"rank {rank} was given {rows} rows of {tokens} tokens; its part of the batch is "
                    f"{len(shard.documents)} of {layout.num_queries(rank)}"
                )
        self._checked = shard


def _meeting_place(group: dist.ProcessGroup, base: nn.Module) -> torch.device:
    """Where the group's ranks talk: under NCCL a GPU, also where the model is not on it yet (FSDP moves it later)."""
    device = next(base.parameters()).device
    if device.type == "cpu" and "nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None:
        raise ParallelError("a parallelized model takes no attention_mask: give it to ranks.shard(batch) instead")


def _refuse_model(config: Any) -> None:
    """Models whose ranks would not compute what one process does."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(x for x in rope.values() if isinstance(x, dict))]
    if changing := [x["rope_type"] for x in kinds if x.get("rope_type") in ("dynamic", "longrope")]:
        raise ParallelError(
            f"rope_type={changing[0]!r} rotates by the length of the text at hand, on which ranks disagree; use linear "
            "or yarn"
        )
    if getattr(config, "output_router_logits", False):
        raise ParallelError(
            "the routers' auxiliary loss is not a sum over tokens; set config.output_router_logits = False"
        )
