"""The plan of models that are not plain decoders: experts, layers with a window of their own, several parts."""

from types import SimpleNamespace

import pytest
import test_chunkwise_models
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lcpatch.cli import main
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.training import buffers, chunkwise, model_sizes, plan, rope, step_cost
from lcpatch.training.config import TrainConfig
from lcpatch.training.model import why_documents_meet
from lcpatch.training.model_sizes import density, on_meta, sizes_of

LIMIT = 0.1  # of test_plan.py
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOW = 20
CONFIGS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2 * 96),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1]}, 96),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 72}, 2 * 48 + 72),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": WINDOW},
        2 * 96,
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": WINDOW}, 96),
}
"""Name -> class, settings, and how wide a token's MLP is."""


def made(name: str, **more):
    kind, settings, _ = CONFIGS[name]
    return getattr(transformers, kind)(**SIZES | settings | more)


@pytest.mark.parametrize("name", CONFIGS)
def test_time_is_that_of_the_products_a_token_goes_through(name: str):
    """As torch counts them; norms and biases, which it does not count, are small."""
    config, tokens = made(name), 40
    sizes = sizes_of(on_meta(config), "lora")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if name != "gemma3":
        model.set_experts_implementation("batched_mm")  # which torch can count
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    attention = 2 * step_cost.attention_flops(sizes, tokens)  # eager computes what is masked, too
    counted = (counter.get_total_flops() - attention) / (2 * tokens) - sizes.head
    assert counted <= sizes.linear <= (1 + LIMIT) * counted
    assert sizes.intermediate == pytest.approx(CONFIGS[name][2], rel=LIMIT)  # beside a router
    assert sizes.weights == 2 * sum(p.numel() for p in model.parameters())  # of all experts


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3"])
@pytest.mark.parametrize("length", [12, 300])
def test_layers_with_a_window_take_its_time(name: str, length: int):
    config = made(name)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = (j <= i).sum()
    window = ((j <= i) & (i - j < WINDOW)).sum() / causal
    full = [kind == "full_attention" for kind in config.layer_types]
    for arm, share in [("full", 1.0), ("sf", model_sizes.density(made("mixtral"), "sf", {}, None, length))]:
        shares = [share if is_full else float(window) for is_full in full]
        assert model_sizes.density(config, arm, {}, None, length) == pytest.approx(sum(shares) / len(shares))


def test_by_chunks_layers_with_a_window_hold_the_whole_row(monkeypatch):
    """What `peak_bytes` says of keys, values and their gradients is what a chunkwise backward holds."""
    held = []
    close = buffers.DeviceStore.close
    monkeypatch.setattr(buffers.DeviceStore, "close", lambda self: (held.append(self.memory()), close(self)))
    config, length = made("gemma3"), 301
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(1, length, dtype=torch.long)
    chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=32)
    sizes = sizes_of(on_meta(config), "lora")
    double = torch.finfo(torch.float32).bits // torch.finfo(torch.bfloat16).bits
    assert held[0]["device"] == double * 2 * sizes.kv * (length - 1)  # nothing follows the last token's label
    more = step_cost.peak_bytes(sizes, length, chunk=32) - step_cost.peak_bytes(sizes, 32, chunk=32)
    assert more == pytest.approx(2 * sizes.kv * (length - 32))


@pytest.mark.parametrize(
    ("name", "flags"), [("gpt_oss", "--layers 1"), ("gemma3", None), ("mixtral", "--layers every_2")]
)
def test_every_second_of_the_layers_that_a_pattern_can_govern(name: str, flags: str | None, tmp_path, capsys):
    made(name).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--length", "5000", "--gpu", "80GB"]) == 0
    said = capsys.readouterr().out
    assert (f"`--attention s2 {flags}`" if flags else "--attention s2") in said
    assert ("every 2nd" in said) == (flags is not None)
    assert ("take the time of its 20 tokens" in said) == (name != "mixtral")


def test_what_a_plan_cannot_say(tmp_path, capsys):
    transformers.Gemma3Config(text_config=SIZES | {"head_dim": 16}).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--length", "5000", "--gpu", "80GB"]) == 2
    assert "gemma3 has several parts; patch its language model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other: its config has no num_experts_per_tok, which a plan needs"):
        model_sizes._active(SimpleNamespace(model_type="other"), "layers.0.experts.down_proj", torch.zeros(2, 3))


def test_a_model_that_chunks_refuse_is_planned_without_them(tmp_path, capsys):
    """What is said to fit can be trained; and why the rest is not there is said."""
    sizes = {**SIZES, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 16, **EXPERTS}
    config = transformers.Qwen3NextConfig(**sizes)
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--length", "1000", "--attention", "full"]) == 0
    said = capsys.readouterr().out
    assert "SeCO" not in said
    assert "Not by chunks (--chunk-size): layers of kind linear_attention carry a state" in said
    assert plan.plan(made("mixtral"), 1000, 80).why_no_chunks is None
    kinds = ["linear_attention", "full_attention"] * 2
    assert density(transformers.Qwen3NextConfig(**sizes, layer_types=kinds), "s2", {}, None, 10**6) == (
        pytest.approx(density(made("mixtral", num_hidden_layers=2), "s2", {}, None, 10**6))
    )  # of the layers that attend
    sizes = sizes_of(on_meta(config))
    assert sizes.checkpoints == 2 * 4 * SIZES["hidden_size"]
    assert sizes.layers == 1


def test_heads_of_two_sizes():
    """Gemma 4's: keys and values as by chunks they are held, and scores of either size."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    config = test_chunkwise_models.gemma4(attention_k_eq_v=True, num_global_key_value_heads=1).config
    sizes = sizes_of(on_meta(config), "lora")
    assert sizes.attention == 4 * (16 + 32) // 2
    assert sizes.kv == 2 * 2 * 2 * (2 * 16 + 1 * 32)
    assert len(plan.plan(config, 1000, 80).rows) > 4


def test_a_config_of_parts_whose_model_is_its_texts(tmp_path, capsys):
    if not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip("this transformers has no Qwen 3.5")
    text = {**SIZES, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 16}
    transformers.Qwen3_5Config(text_config=text).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--length", "1000", "--ranks", "2", "--attention", "full"]) == 0
    assert "Not by chunks (--chunk-size): layers of kind linear_attention" in capsys.readouterr().out
    settings = TrainConfig(model=str(tmp_path))
    assert "carry a state from one document to the next" in why_documents_meet(settings)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    limit = config.get_text_config().max_position_embeddings
    assert rope.extend(config, limit) is config
    with pytest.raises(UnsupportedModelError, match="qwen3_5 has several parts"):
        rope.extend(config, limit + 1)
