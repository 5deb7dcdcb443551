"""Whole training runs of a tiny model: the loss falls, what was trained comes back, a stopped run goes on exactly."""

import json
import shutil
from pathlib import Path

import eval_cases
import pytest
import torch
import training_cases
from noise import FACTOR, distance, model_budget
from safetensors.torch import load_file
from training_cases import SETTINGS, STEPS, Interrupt, ids, run
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

import lcpatch
from lcpatch.cli import main
from lcpatch.core.errors import TrainingError, UnsupportedModelError
from lcpatch.hf.state import SINK_LOGIT
from lcpatch.training import lora, sources, trainer
from lcpatch.training.model import load_model


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """One finished run of each recipe's settings."""
    results = {}
    for name, settings in SETTINGS.items():
        output = tmp_path_factory.mktemp(name)
        results[name] = (run(base, output, **settings), output)
    return results


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_falls(trained, name: str):
    result, output = trained[name]
    assert result.finished
    assert len(result.losses) == STEPS
    assert mean(result.losses[-5:]) < mean(result.losses[:5]) - 0.2
    assert sorted(p.name for p in output.iterdir()) == [
        "checkpoint-16",
        "checkpoint-20",
        "log.json",
        "model",
        "run.json",
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_adapter_comes_back(trained, name: str):
    """From the folder alone: the base by its name, the adapter, the patch, the sink logits."""
    result, output = trained[name]
    model = result.model.eval()
    loaded = lcpatch.from_pretrained(output / "model")
    assert loaded.config.lcpatch == model.config.lcpatch
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
        assert torch.equal(loaded.train()(ids()).logits, model.train()(ids()).logits)


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_equals_adapter(trained, base, name: str):
    _, output = trained[name]
    adapter, merged = (lcpatch.from_pretrained(output / "model") for _ in range(2))
    merged = lora.merge(merged)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    allowed = model_budget(lcpatch.remove(lora.merge(lcpatch.from_pretrained(output / "model"))), ids())
    plain = lcpatch.from_pretrained(output / "model").unload()
    for training in (False, True):
        with torch.no_grad():
            want = adapter.train(training)(ids()).logits
            assert distance(merged.train(training)(ids()).logits, want) <= allowed
            assert distance(plain.train(training)(ids()).logits, want) > 1000 * allowed


def test_sink_logits_train_and_survive(trained, tmp_path: Path):
    """Through the adapter's folder, and through a merge and the full model's folder."""
    result, output = trained["sinklora"]
    logits = [p for n, p in result.model.named_parameters() if n.endswith(SINK_LOGIT)]
    assert len(logits) == 2
    assert all((p != -3).all() for p in logits)
    merged = lora.merge(lcpatch.from_pretrained(output / "model")).eval()
    lcpatch.save_pretrained(merged, tmp_path)
    loaded = lcpatch.from_pretrained(tmp_path)
    found = [p for n, p in loaded.named_parameters() if n.endswith(SINK_LOGIT)]
    assert all(torch.equal(a, b) for a, b in zip(found, logits, strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, merged(ids()).logits)


def test_evaluation_is_dense_and_patched(trained):
    for name in SETTINGS:
        metrics = trained[name][0].metrics
        if name == "chunkwise":  # dense, so there is nothing to tell apart
            assert "eval_patched_loss" not in metrics
            continue
        assert abs(metrics["eval_dense_loss"] - metrics["eval_patched_loss"]) > 1e-4
    log = json.loads((trained["s2"][1] / "log.json").read_text())
    assert all(line["tokens_per_second"] > 0 for line in log if "loss" in line)


def test_chats_are_trained_on(base, tmp_path: Path):
    """SFT through the chat template: what the assistant says is learned, and records that are too long are told of."""
    folder = shutil.copytree(base, tmp_path / "chatty")
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    records = [{"instruction": f"Say {n}.", "output": "Very well, here it is."} for n in range(40)]
    records.append({"instruction": "x " * 500, "output": "No."})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(UserWarning, match="1 of 41 records were left out: longer than 96 tokens"):
        result = run(folder, tmp_path / "run", task="sft", data=(str(tmp_path / "chats.jsonl"),), attention="sf")
    assert mean(result.losses[-3:]) < mean(result.losses[:3]) - 1  # the same answer every time is soon learned


def test_half_precision_weights(base, tmp_path: Path):
    """bf16 where nothing is trained, fp32 where it is; what comes out runs by itself, and comes back as it is."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    result = run(half, tmp_path / "run", dtype="bfloat16", attention="sf", sinks="logit:-3", eval_rows=0)
    assert mean(result.losses[-5:]) < mean(result.losses[:5]) - 0.2
    trained = {n: p.dtype for n, p in result.model.named_parameters() if p.requires_grad}
    assert {dtype for n, dtype in trained.items() if "lora_" in n or n.endswith(SINK_LOGIT)} == {torch.float32}
    assert {dtype for n, dtype in trained.items() if "norm" in n or "embed" in n} == {torch.bfloat16}
    stored = load_file(tmp_path / "run" / "checkpoint-20" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}  # what an exact resumption needs
    loaded = lcpatch.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, result.model.eval()(ids()).logits)
    merged = lora.merge(loaded)
    assert {p.dtype for n, p in merged.named_parameters() if not n.endswith(SINK_LOGIT)} == {torch.bfloat16}


def test_four_bit_weights(base, tmp_path: Path):
    """QLoRA, on the CPU that bitsandbytes serves too; the adapter fits the unquantized base, and only there merges."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "wide"
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    eval_cases.model(tie_word_embeddings=True, initializer_range=0.05, **sizes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    result = run(folder, tmp_path / "run", quantize="4bit", dtype="bfloat16", attention="sf", eval_rows=0)
    assert mean(result.losses[-5:]) < mean(result.losses[:5]) - 0.2
    assert "Linear4bit" in {type(module).__name__ for module in result.model.modules()}
    with pytest.raises(UnsupportedModelError, match="a merge into 4-bit weights rounds"):
        lora.merge(result.model)
    assert lcpatch.from_pretrained(tmp_path / "run" / "model")(ids()).logits.isfinite().all()


def test_four_bits_need_bitsandbytes(base, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quantize='4bit' needs bitsandbytes: pip install bitsandbytes, or leave"):
        load_model(training_cases.config(base, tmp_path, quantize="4bit"))


def test_the_verb_trains(base, tmp_path: Path, capsys):
    """By a recipe's name, and from a YAML file; the same run goes on, or has nothing left to do."""
    words = [
        "--model",
        str(base),
        "--length",
        "96",
        "--steps",
        "2",
        "--eval-rows",
        "1",
        "--output",
        str(tmp_path / "a"),
    ]
    assert main(["train", "longlora", *words]) == 0
    said = capsys.readouterr().out
    assert "2 steps, loss " in said
    assert "evaluation, patched: loss " in said
    (tmp_path / "b.yaml").write_text(f"model: {base}\nlength: 96\nattention: shift\neval_rows: 1\nwarmup: 5\n")
    file = ["train", str(tmp_path / "b.yaml"), "--output", str(tmp_path / "b")]
    assert main([*file, "--steps", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:-1] == said.splitlines()[-4:-1]
    assert main([*file, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "steps" not in said
    assert "evaluation, patched: loss " in said
    assert main([*file, "--steps", "3"]) == 2
    assert "holds a run with steps=2, this one has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorboard", "report_to='tensorboard' cannot begin: pip install tensorboard; or leave --report-to out"),
        ("all, wandb", "report_to='all' is not one of none, all, azure_ml"),
        ("wandb", "report_to='wandb' cannot begin: .*pip install wandb"),
    ],
)
def test_loggers_that_are_not_there_are_told_before_anything(base, tmp_path: Path, monkeypatch, name: str, says: str):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(sources, "read_texts", lambda names: pytest.fail("data was read"))
    with pytest.raises((ImportError, ValueError), match=says):
        run(base, tmp_path / "run", report_to=name)
    assert not (tmp_path / "run").exists()


def test_loggers_are_told_what_is_logged(base, tmp_path: Path, monkeypatch):
    """Two at once, and no third that nobody asked for."""
    told = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs) -> None:
            told.append(sorted(logs))

    kinds = {"one": Logger, "two": Logger, "three": lambda: pytest.fail("nobody asked for it")}
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", kinds)
    run(base, tmp_path, steps=1, eval_rows=0, report_to="one, two")
    assert len(told) == 2 * 2  # the step, and the summary of the run
    assert "tokens_per_second" in told[0]


# Stopping, and going on


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next runs stop by SIGTERM in the step after `step`."""

    def at(step: int) -> None:
        start = trainer.LongTrainer.__init__
        monkeypatch.setattr(
            trainer.LongTrainer,
            "__init__",
            lambda self, **kw: start(self, **{**kw, "callbacks": [Interrupt(step), *kw["callbacks"]]}),
        )

    return at


@pytest.mark.parametrize("name", ["sinklora", "s2", "spaco"])
def test_a_stopped_run_goes_on_exactly(trained, base, tmp_path: Path, interrupt, monkeypatch, name: str):
    """Also in the middle of gradient accumulation, with dropout: the same losses and the same weights."""
    spaco = {"spaco": {**SETTINGS["chunkwise"], "keep_chunks": 0.5}}
    settings = {**SETTINGS, **spaco}[name] | {
        "steps": 10,
        "accumulate": 2,
        "lora_dropout": 0.2,
    }
    whole = run(base, tmp_path / "whole", **settings)
    with monkeypatch.context():
        interrupt(3)
        first = run(base, tmp_path / "parts", **settings)
    assert (first.finished, first.step) == (False, 4)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint-4", "log.json", "run.json"]
    monkeypatch.undo()
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path / "cache"))
    rest = run(base, tmp_path / "parts", **settings)
    assert first.losses + rest.losses == whole.losses
    a, b = (dict(r.model.named_parameters()) for r in (whole, rest))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert rest.metrics["eval_dense_loss"] == whole.metrics["eval_dense_loss"]


def test_evaluation_changes_no_step(base, tmp_path: Path):
    """With dropout, too, whose masks are random: a run may go on with another --evaluate-every."""
    settings = SETTINGS["longlora"] | {"steps": 4, "save_every": 0, "lora_dropout": 0.3}
    never, often = (run(base, tmp_path / str(every), evaluate_every=every, **settings) for every in (0, 1))
    assert often.losses == never.losses
    assert [line["step"] for line in often.log if "eval_patched_loss" in line] == [1, 2, 3, 4]  # the last one once
    assert often.metrics["eval_dense_loss"] == never.metrics["eval_dense_loss"]


def test_a_finished_run_takes_no_further_step(base, tmp_path: Path):
    """Run again it has nothing left to do; where its model is missing, that is written from the last checkpoint."""
    settings = SETTINGS["sinklora"] | {"steps": 4, "save_every": 4}
    whole = run(base, tmp_path, **settings)
    shutil.rmtree(tmp_path / "model")
    again = run(base, tmp_path, **settings)
    assert (again.finished, again.step, again.losses) == (True, 4, [])
    a, b = (dict(r.model.named_parameters()) for r in (whole, again))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert again.metrics["eval_dense_loss"] == whole.metrics["eval_dense_loss"]
    assert (tmp_path / "model").is_dir()


def test_a_run_with_another_config_is_refused(trained, base, monkeypatch):
    _, output = trained["longlora"]
    before = sorted(output.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a run with learning_rate=0.005, this one has 0.001: take another"):
        run(base, output, **SETTINGS["longlora"], learning_rate=1e-3)
    with monkeypatch.context() as patch:  # the same name, another text
        patch.setattr(sources, "read_texts", lambda names: (["Some other text. " * 2000], "other"))
        with pytest.raises(ValueError, match=r"holds a run on other data: what --data names has changed since"):
            run(base, output, **SETTINGS["longlora"])
    with pytest.raises(ValueError, match=r"holds a run already; take another --output"):
        run(base, output, **SETTINGS["longlora"], resume="never")
    assert sorted(output.rglob("*")) == before


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path: Path):
    """Before it reaches a weight, and with the checkpoints left as they were."""
    with pytest.raises(TrainingError, match=r"became (nan|inf) at step 2; .* Lower --learning-rate"):
        run(base, tmp_path, attention="full", learning_rate=1e30, save_every=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "run.json"]


# Longer contexts, and memory


def test_chunks_train_as_whole_rows_do(trained, base, tmp_path: Path):
    """The same losses up to rounding, whose size two other orders of sums tell; SpaCO's differ."""
    settings = {"attention": "full", "steps": 6, "eval_rows": 0}
    whole = run(base, tmp_path / "whole", **settings).losses

    def apart(name: str, **more) -> float:
        return max(
            abs(a - b) for a, b in zip(run(base, tmp_path / name, **settings, **more).losses, whole, strict=True)
        )

    ulp = torch.finfo(torch.float32).eps * max(whole)
    allowed = FACTOR * max(ulp, apart("sdpa", dense="eager"))
    assert apart("chunks", chunk_size=40) <= allowed
    assert apart("spaco", chunk_size=40, keep_chunks=0.5) > 1000 * allowed


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic"])
def test_an_extended_adapter_comes_back_extended(base, tmp_path: Path, rope: str):
    """The base's own config knows nothing of it."""
    result = run(base, tmp_path, attention="full", length=600, rope=rope, steps=1, eval_rows=0, checkpointing="none")
    model = result.model.eval()
    assert model.config.rope_parameters["rope_type"] == rope
    assert model.config.max_position_embeddings == (512 if rope == "dynamic" else 1024)
    loaded = lcpatch.from_pretrained(tmp_path / "model")
    text = ids(600)  # as long as a row: transformers' dynamic frequencies depend on the longest text seen so far
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, model(text).logits)
    plain = type(model.get_base_model()).from_pretrained(base)
    with pytest.raises(ValueError, match=r"was trained with .* but the base has"):
        lcpatch.from_pretrained(tmp_path / "model", base=plain)


@pytest.mark.parametrize(
    "settings", [{"checkpointing": "none"}, {"checkpointing": "selective"}, {"offload": True}], ids=str
)
def test_memory_settings_change_no_loss(base, tmp_path: Path, settings):
    want = run(base, tmp_path / "full", attention="sf", steps=4, eval_rows=0)
    got = run(base, tmp_path / "other", attention="sf", steps=4, eval_rows=0, **settings)
    assert got.losses == want.losses


def test_selective_recomputation_runs_attention_once(base, tmp_path: Path):
    """Counted by the op's own calls."""
    counts = {}
    for kind in ("full", "selective"):
        model = training_cases.run(base, tmp_path / kind, steps=1, eval_rows=0, attention="full").model
        lcpatch.apply(model, "sf")
        counts[kind] = _calls(model, kind)
    assert counts == {"full": 2 * 2, "selective": 2}


def _calls(model, kind: str) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    from lcpatch.training.model import checkpointing_settings, enable_inputs

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            Count.number += "flash_attn_block_sparse" in name and "backward" not in name
            return function(*args, **(kwargs or {}))

    model.train()
    (settings,) = (v for v in checkpointing_settings(kind).values() if isinstance(v, dict))
    checkpoint(model.get_base_model(), settings)
    hook = enable_inputs(model)
    with Count():
        model(ids(), labels=ids(), use_cache=False).loss.backward()
    hook.remove()
    return Count.number


def checkpoint(model, settings) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5.23
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
