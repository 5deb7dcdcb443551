"""Prefix sinks through a training run: they move, each its own way, and come back; a stopped run goes on exactly."""

from pathlib import Path

import pytest
import torch
from models import build, tokens
from training_cases import Interrupt, ids, run

import lcpatch
from lcpatch.hf.models import attention_modules, unwrap
from lcpatch.hf.sinks import is_sink, sink_parameters
from lcpatch.hf.state import SINK_LOGIT
from lcpatch.training import lora, trainer

SETTINGS = {"attention": "sf", "sinks": "prefix:2", "eval_rows": 0}


def sinks(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in sink_parameters(attention_modules(unwrap(model))).items()}


def test_they_train_and_survive(base, tmp_path: Path):
    """20 steps from a start that hardly shows; all of each sink moves, and adapter and merge keep what was learnt."""
    result = run(base, tmp_path / "run", **SETTINGS)
    found = sinks(result.model)
    start = sinks(lcpatch.apply(lcpatch.remove(unwrap(result.model)), "sf", sinks="prefix:2"))
    assert len(found) == 6
    for name, x in found.items():
        assert (x != start[name]).all(), name
    for name, x in found.items():
        if name.endswith("value"):
            assert (x[:, 0] - x[:, 1]).abs().min() > 0, name
    first, last = (sum(part) / 5 for part in (result.losses[:5], result.losses[-5:]))
    assert last < first - 0.2
    loaded = lcpatch.from_pretrained(tmp_path / "run" / "model")
    merged = lora.merge(lcpatch.from_pretrained(tmp_path / "run" / "model")).eval()
    for model in (loaded, merged):
        assert all(torch.equal(x, found[name]) for name, x in sinks(model).items())
    lcpatch.save_pretrained(merged, tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(lcpatch.from_pretrained(tmp_path / "merged")(ids()).logits, merged(ids()).logits)


def test_they_train_beside_an_adapter_in_fp32():
    """Whichever came first, the adapter or the patch; and for all of their parts there is a gradient at the start."""
    for order in ("patch first", "wrap first"):
        model = build().to(torch.bfloat16)
        if order == "patch first":
            model = lora.prepare(lcpatch.apply(model, "sf", sinks="prefix:2"))
        else:
            model = lcpatch.apply(lora.prepare(model), "sf", sinks="prefix:2")
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found = {n: p for n, p in model.named_parameters() if is_sink(n)}
        assert len(found) == 6
        for name, parameter in found.items():
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert (parameter.grad != 0).any(-1).all(), name
        lora.settle(model)
        assert {p.dtype for p in found.values()} == {torch.float32}


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(base, tmp_path: Path, monkeypatch):
    whole = run(base, tmp_path / "whole", **SETTINGS)
    own = trainer.LongTrainer.__init__

    def interrupted(self, *args, **kwargs) -> None:
        own(self, *args, **kwargs)
        self.add_callback(Interrupt(9))

    with monkeypatch.context() as m:
        m.setattr(trainer.LongTrainer, "__init__", interrupted)
        stopped = run(base, tmp_path / "run", **SETTINGS)
    assert not stopped.finished
    resumed = run(base, tmp_path / "run", **SETTINGS)
    assert stopped.losses + resumed.losses == whole.losses
    want = sinks(whole.model)
    assert all(torch.equal(x, want[name]) for name, x in sinks(resumed.model).items())


def test_logits_do_not_decay(base, tmp_path: Path):
    """Of what is trained, the first step moves by its gradient alone what is no weight."""
    settings = {"attention": "sf", "sinks": "logit:-3", "steps": 1, "save_every": 0, "eval_rows": 0}
    decayed, whole = (
        dict(run(base, tmp_path / str(decay), weight_decay=decay, **settings).model.named_parameters())
        for decay in (0.5, 0.0)
    )
    same = {name for name, p in whole.items() if p.requires_grad and torch.equal(p, decayed[name])}
    assert sum(name.endswith(SINK_LOGIT) for name in same) == 2
    assert not any("lora_A" in name for name in same)
