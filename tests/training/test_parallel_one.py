"""A group of one rank, which every machine has: the same as no group; and what is refused before anything is sent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import SHORT, build, tokens
from parallel_cases import EXACT, batch_of, distance, gradients, loss_of, make_model, single, worst
from torch.nn.parallel import DistributedDataParallel

import lcpatch
from lcpatch.core.errors import ParallelError, UnknownNameError
from lcpatch.hf.attention import SHARD
from lcpatch.training.parallel import alive, parallelize
from lcpatch.training.parallel.balance import plan
from lcpatch.training.parallel.link import Link
from lcpatch.training.parallel.trainer import ParallelMixin


@pytest.mark.parametrize("strategy", ["auto", "halo", "ring", "tokenring", "lightseq", "ulysses"])
@pytest.mark.parametrize("kind", ["packed", "left"])
def test_one_rank_computes_what_the_model_does(group, strategy: str, kind: str):
    batch, docs = batch_of(kind)
    model = make_model("llama", None, torch.float64, lora=False, checkpoint=False)
    want = single(model, docs)
    model.zero_grad(set_to_none=True)
    with parallelize(model, strategy=strategy) as ranks:
        loss = loss_of(model, ranks.shard(batch))
        loss.backward()
        ranks.sum_gradients(model.parameters())
        assert worst((ranks.total(loss), gradients(model)), want) <= EXACT
        assert ranks.link.sent == 0
        assert set(ranks.chosen) == {0, 1}


def test_autocast(group):
    model = lcpatch.apply(build(), "sf", mode="always", **SHORT["sf"])
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = model(ids).logits
        with parallelize(model) as ranks:
            got = model(**ranks.shard({"input_ids": ids})).logits
    assert got.dtype == want.dtype
    assert distance(got, want) == 0


def test_ranks_meet_on_gpus_though_the_model_is_not_there_yet(group, monkeypatch):
    """FSDP moves it later; NCCL alone takes no tensor of a host, and beside gloo it would not have met."""
    met = []
    monkeypatch.setattr(Link, "gather", lambda link, values, device: met.append(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for backend in ("cuda:nccl", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo"):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, backend=backend: backend)
        parallelize(build()).close()
    assert [str(device) for device in met] == ["cuda:3", "cuda:3", "cpu"]


def test_documents_too_short_to_cut_leave_no_rank_without_tokens(group):
    ids, positions = torch.arange(10)[None], torch.tensor([[0, 1, 0, 1, 2, 0, 1, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions}
    with parallelize(build()) as ranks:
        assert ranks.shard(batch, members=range(3))[SHARD].layout.name == "per_document"
        assert ranks.shard(batch, members=range(4))[SHARD].layout.name == "contiguous"
    with (
        parallelize(build(), layout="per_document") as ranks,
        pytest.raises(ParallelError, match="leaves some of 4 ranks without any token"),
    ):
        ranks.shard(batch, members=range(4))


def test_a_step_after_an_evaluation_is_cut_for_training(group):
    """Its trainer only then turns the model to training, where a pattern of it is off until that is done."""
    cuts = []

    class Trainer:
        args = SimpleNamespace(device=torch.device("cpu"), average_tokens_across_devices=True)

        def training_step(self, model, part, num_items):
            cuts.append(part[SHARD].layout.name)
            return torch.zeros(())

    class Sharing(ParallelMixin, Trainer):
        pass

    trainer, model = Sharing(), lcpatch.apply(build(), "shift", mode="train", **SHORT["shift"])
    batch = {"input_ids": tokens(), "labels": tokens()}
    with parallelize(model) as trainer.ranks:
        model.eval()
        trainer.training_step(DistributedDataParallel(model), batch, 10)
    assert cuts == ["contiguous"]


def test_what_is_refused(group):
    model = build()
    with pytest.raises(UnknownNameError, match="unknown parallel strategy"):
        parallelize(model, strategy="zigzag")
    with parallelize(model, strategy="ulysses") as ranks:
        with pytest.raises(ParallelError, match=r"rank 0 called the model without a shard"):
            model(tokens())
        with pytest.raises(ParallelError, match="takes no attention_mask: give it to"):
            model(**ranks.shard({"input_ids": tokens()}), attention_mask=torch.ones(1, 75))
        with pytest.raises(ParallelError, match="this model is parallelized already"):
            parallelize(model)
        with pytest.raises(ValueError, match="patch it first"):
            lcpatch.apply(model, "sf")
        with pytest.raises(ParallelError, match=r"rank 0 is not among the ranks \[1, 2\]"):
            ranks.shard({"input_ids": tokens()}, members=(2, 1))
        inputs = ranks.shard({"input_ids": tokens()})
    with pytest.raises(ValueError, match="lcpatch_shard was given to a model that is not parallelized"):
        lcpatch.apply(model, "sf")(**inputs)


@pytest.mark.parametrize("strategy", ["ring", "tokenring"])
def test_a_pattern_needs_a_strategy_that_serves_it(group, strategy: str):
    model = lcpatch.apply(build(), "s2", **SHORT["s2"])
    with (
        parallelize(model, strategy=strategy) as ranks,
        pytest.raises(ParallelError, match=r"layer 0 cannot run .*halo"),
    ):
        model(**ranks.shard({"input_ids": tokens()}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic' rotates",
        ),
        ({"output_router_logits": True}, "auxiliary loss is not a sum"),
    ],
)
def test_models_whose_ranks_would_disagree_are_refused(group, settings, message):
    model = build()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ParallelError, match=message):
        parallelize(model)
    assert model.config._attn_implementation != "lcpatch"


def test_without_a_group():
    with pytest.raises(ParallelError, match=r"torch.distributed is not initialised: start with torchrun"):
        Link()
    assert plan([5, 6], 1, 8).counts() == [2]


def test_a_pulse_tells_who_beats(monkeypatch):
    """Ranks as objects on one store: one stops, one never starts, and then the store itself goes."""
    monkeypatch.setattr(alive, "BEAT", 0.05)
    store = dist.HashStore()
    mine, other, third = (alive.Pulse(store, "test", rank, 4) for rank in (0, 1, 2))
    assert mine.who_is_gone() == "rank 3 is gone"
    other.stop()
    assert mine.who_is_gone() == "ranks 1, 3 are gone"
    third.stop()

    def closed(*_: object) -> None:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(mine, "_read", closed)
    assert mine.who_is_gone().startswith("the process that keeps torch.distributed's store")
    mine.stop()
    pair = [alive.Pulse(store, "two", rank, 2) for rank in (0, 1)]
    assert pair[0].who_is_gone().startswith("all ranks are alive")
    for pulse in pair:
        pulse.stop()
