"""Random combinations of what the other tests try one by one: family, patch, rows, labels, adapter, checkpointing."""

import random

import pytest
import torch
from chunkwise_cases import assert_same, chunked, plain, rounding, rounding_of_attention
from models import SHORT, build, tokens
from peft import LoraConfig, get_peft_model
from schedules import documents, pack, pad, positions_of
from torch import Tensor, nn

import lcpatch

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3_text", "gpt_oss", "smollm3", "mistral")
TARGETS = {"gpt_neox": [["query_key_value"]], "gpt_oss": [["k_proj", "v_proj"]]}


def a_model(choose: random.Random, family: str) -> nn.Module:
    model = build(family)
    if choose.random() < 0.4:
        targets = TARGETS.get(family, [["q_proj", "v_proj"], ["k_proj"], ["o_proj"], ["k_proj", "up_proj"]])
        layers = choose.choice([None, [1]])
        lora = LoraConfig(
            r=4, target_modules=choose.choice(targets), layers_to_transform=layers, init_lora_weights=False
        )
        torch.manual_seed(1)
        model = get_peft_model(model, lora)
    model = model.double().train()
    method = choose.choice([None, None, *SHORT])
    if method is not None:
        settings = {"layers": choose.choice([None, [0]]), "mode": choose.choice(["always", "train"]), **SHORT[method]}
        lcpatch.apply(model, method, **settings)
    model.enable_input_require_grads()
    return model


def some_rows(choose: random.Random, isolated: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token ids, labels and the rest; packed rows only where the model keeps documents apart."""
    kind = choose.choice(["whole", "left", "right", *(["packed"] if isolated else [])])
    if kind == "whole":
        ids, inputs = tokens(choose.choice([1, 2]), choose.choice([75, 64, 40])), {}
    elif kind == "packed":
        ids, positions = pack(documents())
        inputs = {"position_ids": positions}
    else:
        ids, mask = pad(documents(), kind)
        inputs = {"attention_mask": mask} | ({"position_ids": positions_of(mask)} if choose.random() < 0.5 else {})
    labels = ids.clone()
    if "attention_mask" in inputs:
        labels[inputs["attention_mask"] == 0] = -100
    if choose.random() < 0.4:
        labels[:, : choose.randrange(30)] = -100
    if choose.random() < 0.3:
        labels[:, -choose.randrange(1, 9) :] = -100
    return ids, labels, inputs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_combination(seed: int):
    choose = random.Random(seed)
    family = choose.choice(FAMILIES)
    model = a_model(choose, family)
    ids, labels, inputs = some_rows(choose, isolated=family != "gpt_oss" or hasattr(model.config, "lcpatch"))
    attention = choose.choice(["own", "lcpatch", "cudnn", "auto"])
    options = {"attention": attention, "offload": attention != "own" and choose.random() < 0.4}
    size, reentrant = choose.choice([5, 16, 33, 64, 200]), choose.choice([None, False, True])
    want = plain(model, ids, labels, **inputs)
    if hasattr(model.config, "lcpatch"):  # whose dense layers may run through another implementation
        allowed = 8 * rounding(model)
    else:
        allowed = 8 * rounding_of_attention(model, ids, labels, **inputs)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(chunked(model, ids, labels, size, **options, **inputs), want, allowed)
