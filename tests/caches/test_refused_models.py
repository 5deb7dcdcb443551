"""Models that no cache here serves: what the message says is so, and it says what to do instead."""

import pytest
import torch
import transformers
from cache_cases import ALL
from models import build, tokens

import lcpatch
from lcpatch.caches import caches
from lcpatch.hf.layers import dense_states

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
@pytest.mark.filterwarnings("ignore:.* mamba")
def test_attention_beside_a_state_space_model_in_one_layer():
    config = transformers.FalconH1Config(**SIZES, **MAMBA, num_hidden_layers=2, mamba_d_ssm=32, mamba_d_head=8)
    model, ids = transformers.FalconH1ForCausalLM(config).eval(), tokens(1, 30)
    with pytest.raises(lcpatch.UnsupportedModelError, match="state-space model side by side") as refused:
        lcpatch.H2OCache(model)
    with pytest.raises(lcpatch.UnsupportedModelError, match="state-space model side by side"):
        lcpatch.apply(model, "sink")
    # What it says to do works: without a cache of ours, and a model that it names.
    assert model.generate(ids, max_new_tokens=3).shape == (1, 33)
    assert "bamba" in str(refused.value)
    config = transformers.BambaConfig(
        **SIZES, **MAMBA, num_hidden_layers=3, attn_layer_indices=[1], mamba_d_head=16, num_logits_to_keep=1
    )
    model = transformers.BambaForCausalLM(config).eval()
    want, got = (
        model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
        for cache in (None, lcpatch.H2OCache(model, 4096))
    )
    assert torch.equal(want, got)


@pytest.mark.parametrize("name", [name for name in ALL if name != "s2"])
def test_the_meta_device(name):
    model = build().to("meta")
    with pytest.raises(lcpatch.UnsupportedModelError, match=r"a model on the meta device has no .*; load its weights"):
        model(torch.zeros(1, 9, dtype=torch.long, device="meta"), past_key_values=caches.get(name)(model))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model", [None, "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_what_is_no_model(model, name):
    with pytest.raises(
        lcpatch.UnsupportedModelError, match="is not a transformers model; wanted: a decoder-only model"
    ):
        caches.get(name)(model)


def test_a_model_that_tells_its_choice_of_keys_to_transformers_attention_only():
    """Under any other it would read all of them; so would its other layers, whose cache is transformers' own."""
    minimax = pytest.importorskip("transformers.models.minimax_m3_vl", reason="newer than this transformers")
    kinds = ["full_attention", "minimax_m3_sparse"]
    choice = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2}
    config = minimax.MiniMaxM3VLTextConfig(
        **SIZES,
        **choice,
        num_hidden_layers=2,
        head_dim=16,
        rotary_dim=8,
        layer_types=kinds,
        mlp_layer_types=["dense"] * 2,
        bos_token_id=1,
    )
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), tokens(1, 60)
    with torch.no_grad():
        want = model(ids).logits
    with pytest.raises(lcpatch.UnsupportedModelError, match="an indexer that chooses each token's keys"):
        lcpatch.H2OCache(model, 4096)
    with pytest.raises(lcpatch.UnsupportedModelError, match="an indexer that chooses each token's keys"):
        lcpatch.apply(model, "s2")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_a_model_without_positions_in_its_full_attention_layers_may_say_so_by_type():
    config = transformers.Cohere2Config(**SIZES, num_hidden_layers=2, head_dim=16, sliding_window=8)
    config.layer_types = ["sliding_attention", "full_attention"]
    config.rope_parameters = {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert dense_states(config, {}, "sdpa") == {}


def test_values_of_another_size_than_keys():
    mimo = pytest.importorskip("transformers.models.mimo_v2_flash", reason="newer than this transformers")
    config = mimo.MiMoV2FlashConfig(
        **SIZES,
        num_hidden_layers=2,
        head_dim=16,
        v_head_dim=8,
        layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense"] * 2,
        bos_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(lcpatch.UnsupportedModelError, match="keys and values that differ in size"):
        lcpatch.TieredCache(model)


def test_a_model_that_scales_its_embeddings_in_place_is_asked_for_its_positions():
    config = transformers.CTRLConfig(vocab_size=61, n_positions=64, n_embd=32, dff=40, n_layer=2, n_head=4)
    with pytest.raises(lcpatch.UnsupportedModelError, match="it adds positions to its tokens"):
        lcpatch.SinkCache(transformers.CTRLLMHeadModel(config).eval())
