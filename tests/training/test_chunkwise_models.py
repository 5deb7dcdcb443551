"""Models with ways of their own around their cache: the exact gradient by chunks, or a refusal; never another."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from chunkwise_cases import assert_same, chunked, far, plain, rounding, rounding_of_attention, taken
from models import SHORT, VOCAB, build, tokens
from odd_models import SIZES, make
from schedules import documents, pack, pad
from torch import nn

import lcpatch
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.eval.perplexity import token_nll
from lcpatch.hf.state import ATTRIBUTE
from lcpatch.training import chunkwise, support
from lcpatch.training.fused import can_fuse, fused_loss
from lcpatch.training.rope import extend


@pytest.mark.parametrize("prefix", ["DiffLlama", "JetMoe"])
def test_a_model_that_does_more_than_attend_to_what_its_cache_returns(prefix: str, monkeypatch: pytest.MonkeyPatch):
    """Our attention would be given something else: refused where it was asked for, left alone where it was not."""
    model, ids = make(prefix), tokens(2)
    want = plain(copy.deepcopy(model).double(), ids, ids)
    allowed = 2 * far(plain(model, ids, ids)[1], want[1])  # DiffLlama sums its lambdas in fp32 whatever its dtype
    assert 0 < allowed < 1e-3
    for options in ({"attention": "lcpatch"}, {"attention": "cudnn"}, {"offload": True}):
        with pytest.raises(UnsupportedModelError, match="use attention='own'"):
            chunked(model, ids, ids, 16, **options)
    monkeypatch.setattr(support, "_has_kernel", lambda base: True)  # "auto" as on a GPU
    for size in (16, 75):
        assert_same(chunked(model, ids, ids, size), want, allowed)
    chunkwise.rehearse(model, length=40, chunk_size=16)
    assert model.config._attn_implementation == "sdpa"


def test_a_patched_model_that_does_more_than_attend(monkeypatch: pytest.MonkeyPatch):
    """Its patch stays on, by chunks too, and nothing of the attempt is left on it."""
    model, ids = lcpatch.apply(make("DiffLlama"), "s2", **SHORT["s2"]), tokens(2)
    want, budget = plain(copy.deepcopy(model).double(), ids, ids), plain(model, ids, ids)
    monkeypatch.setattr(support, "_has_kernel", lambda base: True)
    assert_same(chunked(model, ids, ids, 16), want, 2 * far(budget[1], want[1]))
    assert all(m.__dict__[ATTRIBUTE].note.layer is None for m in model.modules() if ATTRIBUTE in m.__dict__)


def test_a_model_that_attends_to_other_keys_than_its_cache_returned(monkeypatch: pytest.MonkeyPatch):
    model, ids = build().double().train(), tokens(2)
    update = chunkwise.ChunkCache.update
    seen = []

    def another_layers(self, *args, **kwargs):
        seen.append(update(self, *args, **kwargs))
        return seen[0]

    monkeypatch.setattr(chunkwise.ChunkCache, "update", another_layers)
    with pytest.raises(UnsupportedModelError, match="layer 1 attends to other keys or values than its cache returned"):
        chunked(model, ids, ids, 16, attention="lcpatch")


@pytest.mark.parametrize("attention", ["own", "lcpatch"])
def test_a_model_that_calls_the_decoder_inside_its_base(attention: str):
    model, ids = make("OPT").double(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    assert_same(chunked(model, ids, ids, 16, attention=attention), want, allowed)
    (padded, mask), inner = pad(documents(), "left"), model.model.decoder
    labels = padded.masked_fill(mask == 0, -100)
    want = plain(model, padded, labels, attention_mask=mask)
    assert_same(chunked(model, padded, labels, 16, attention=attention, attention_mask=mask), want, allowed)
    assert "forward" not in inner.__dict__


def test_the_loss_of_such_a_model_a_few_rows_at_a_time():
    """What the trainer and the measure of perplexity compute, of whole rows."""
    model, ids = make("OPT").double(), tokens(2)
    want = plain(model, ids, ids)
    model.zero_grad()
    loss = fused_loss(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    loss.backward()
    assert_same((loss.item(), taken(model)), want, rounding(model))
    assert token_nll(model.eval(), ids).mean().item() == pytest.approx(want[0], rel=1e-6)  # in fp32


def test_a_model_that_does_not_call_its_decoder(monkeypatch: pytest.MonkeyPatch):
    model, ids = build(), tokens(2)
    monkeypatch.setattr(model.model, "decoder", nn.Linear(1, 1), raising=False)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not call its Linear"):
        chunked(model, ids, ids, 16)


def gemma4(**changes) -> nn.Module:
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 20}
    inputs = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "pad_token_id": 0}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(**sizes, **inputs, layer_types=kinds, **changes)
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config).double().train()


@pytest.mark.parametrize("changes", [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 1}])
def test_gemma4(changes: dict):
    """Heads of two sizes, embeddings for every layer; keys that are the values; patched, too."""
    model, ids = gemma4(**changes), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    for options in ({}, {"attention": "own"}, {"attention": "lcpatch"}, {"offload": True}):
        assert_same(chunked(model, ids, ids, 16, **options), want, allowed)
    lcpatch.apply(model, "s2", sinks="logit:0", **SHORT["s2"]).double()
    assert_same(chunked(model, ids, ids, 16), plain(model, ids, ids), rounding(model))


def test_gemma4_whose_layers_share_keys():
    with pytest.raises(UnsupportedModelError, match="last 2 layers read other layers' keys"):
        chunked(gemma4(num_kv_shared_layers=2), tokens(2), tokens(2), 16)


def test_an_encoder_with_a_head():
    """It sees what follows, unless its config says that it is a decoder: then it is like any other."""
    sizes = {**SIZES, "type_vocab_size": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def bert(is_decoder: bool) -> nn.Module:
        torch.manual_seed(0)
        return transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=is_decoder)).double().train()

    ids = tokens(2)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        chunked(bert(False), ids, ids, 16)
    decoder = bert(True)
    for name, p in decoder.named_parameters():
        p.requires_grad_(not name.endswith("key.bias"))  # which has no gradient but rounding
    assert_same(chunked(decoder, ids, ids, 16), plain(decoder, ids, ids), rounding(decoder))


def test_a_model_with_a_loss_of_its_own():
    """Set by the user, or by its class: chunks refuse it, and the trainer leaves it to the model."""
    ids = tokens(2)
    own = build()
    own.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    tags = transformers.LlamaForTokenClassification(transformers.LlamaConfig(**SIZES, num_labels=VOCAB))
    for model in (own, tags):
        assert not can_fuse(model)
        with pytest.raises(UnsupportedModelError, match="its loss is not the cross-entropy of the next token"):
            chunked(model, ids, ids, 16)
    assert can_fuse(build())


def test_decoders_of_encoders():
    """Transformers does not shift their labels."""
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 99,
    }
    model = transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**sizes, decoder_attention_heads=2))
    assert not can_fuse(model)
    with pytest.raises(UnsupportedModelError, match="not the cross-entropy of the next token"):
        chunked(model, tokens(2), tokens(2), 16)


def test_positions_that_follow_the_pads_among_tokens():
    """RoBERTa's do, and a chunk does not see those before it; positions that are given do not."""
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes, is_decoder=True)).double().train()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("key.bias"))  # which has no gradient but rounding
    ids = tokens(2)
    allowed = rounding(model)
    assert_same(chunked(model, ids, ids, 16), plain(model, ids, ids), allowed)
    ids[0, 5] = 0
    with pytest.raises(UnsupportedModelError, match="pass position_ids"):
        chunked(model, ids, ids, 16)
    given = {"position_ids": torch.arange(1, 1 + ids.shape[1])[None]}
    assert_same(chunked(model, ids, ids, 16, **given), plain(model, ids, ids, **given), allowed)


def test_layers_without_positions(monkeypatch: pytest.MonkeyPatch):
    """Beam says so by a None among its rope_parameters."""
    model, ids = build("gemma3_text").double().train(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding_of_attention(model, ids, ids)
    monkeypatch.setitem(model.config.rope_parameters, "full_attention", None)
    assert_same(chunked(model, ids, ids, 16, attention="lcpatch"), want, allowed)
    with pytest.raises(UnsupportedModelError, match="rope='none'"):
        extend(model.config, 10**4)


def test_a_model_that_views_what_attention_returned():
    if not hasattr(transformers, "AfmoeConfig"):
        pytest.skip("this transformers has no AFMoE")
    model, ids = make("Afmoe").double(), tokens(2)
    model.set_experts_implementation("batched_mm")
    want = plain(model, ids, ids)
    assert_same(chunked(model, ids, ids, 16, attention="lcpatch"), want, rounding_of_attention(model, ids, ids))


def test_llama4():
    """Its base is no part of it by name; layers attend within chunks of their own, or without positions."""
    own = {"intermediate_size_mlp": 40, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 20}
    config = transformers.Llama4TextConfig(**{**SIZES, "num_hidden_layers": 4, "head_dim": 16}, **own, floor_scale=8)
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).double().train()
    whole, (padded, mask) = tokens(2), pad(documents(), "left")
    for ids, inputs in ((whole, {}), (padded, {"attention_mask": mask})):
        labels = ids.masked_fill(mask == 0, -100) if inputs else ids
        want, allowed = plain(model, ids, labels, **inputs), rounding_of_attention(model, ids, labels, **inputs)
        allowed = max(allowed, torch.finfo(torch.float32).eps)  # it rotates in fp32, where shapes decide the last bit
        for attention in ("own", "lcpatch"):
            assert_same(chunked(model, ids, labels, 16, attention=attention, **inputs), want, allowed)
    model.zero_grad()
    loss = fused_loss(model, {"input_ids": whole, "labels": whole, "use_cache": False})
    loss.backward()
    assert_same(
        (loss.item(), taken(model)), plain(model, whole, whole), max(rounding(model), torch.finfo(torch.float32).eps)
    )


def test_packed_documents_of_a_model_that_does_not_know_its_configs_window():
    """Moshi's config names one, which its attention is not told of."""
    sizes = {**SIZES, "num_key_value_heads": 4, "ffn_dim": 40, "head_dim": 16, "sliding_window": 16}
    torch.manual_seed(0)
    model = transformers.MoshiForCausalLM(transformers.MoshiConfig(**sizes)).double().train()
    ids, positions = pack(documents())
    first = positions[0, 1:].argmin() + 1  # where the second document begins
    with torch.no_grad():
        among, alone = model(ids, position_ids=positions).logits[:, first], model(ids[:, first:]).logits[:, 0]
    if not torch.allclose(among, alone):
        pytest.skip("this transformers' Moshi lets packed documents see each other")
    want = plain(model, ids, ids, position_ids=positions)
    got = chunked(model, ids, ids, 16, attention="own", position_ids=positions)
    assert_same(got, want, rounding(model))


def odd(prefix: str, head: str, **names) -> nn.Module:
    """A tiny model whose config has other names for its sizes."""
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}{head}")(
        getattr(transformers, f"{prefix}Config")(**{"vocab_size": VOCAB, **names})
    )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (odd("OpenAIGPT", "LMHeadModel", n_embd=32, n_layer=1, n_head=2), "makes its masks by itself, and takes none"),
        (odd("Bloom", "ForCausalLM", hidden_size=32, n_layer=1, n_head=2), "counts distances .ALiBi. by a mask"),
        (odd("Falcon", "ForCausalLM", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True), "ALiBi"),
    ],
)
def test_packed_documents_of_a_model_that_cannot_be_told_of_them(model: nn.Module, says: str):
    ids, positions = pack(documents())
    with pytest.raises(UnsupportedModelError, match=f"{says}.*: give it one document a row"):
        chunked(model, ids, ids, 16, position_ids=positions)


def test_a_class_that_computes_its_loss_by_itself():
    """Of labels that are not shifted."""
    model = odd("XLM", "WithLMHeadModel", emb_dim=32, n_layers=1, n_heads=2)
    assert not can_fuse(model)
    with pytest.raises(UnsupportedModelError, match="its loss is not the cross-entropy of the next token"):
        chunked(model, tokens(2), tokens(2), 16)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize(
    "new",
    [
        lambda: odd("GPT2", "LMHeadModel", **GPT2, attn_implementation="eager"),
        lambda: odd("Doge", "ForCausalLM", **SIZES),  # whose layers add a mask of their own
    ],
    ids=["eager", "doge"],
)
def test_a_pad_that_predicts_where_it_sees_everything(new: Callable[[], nn.Module]):
    """Its attention is spread evenly over the row, also over what follows."""
    model = new().double().train()
    (ids, mask), rows = pad(documents(), "left"), torch.arange(len(documents()))
    labels = ids.masked_fill(mask == 0, -100)
    with pytest.raises(ValueError, match=r"a pad before a text predicts its first token.*first token's label to -100"):
        chunked(model, ids, labels, 16, attention_mask=mask)
    labels[rows, mask.argmax(-1)] = -100
    want = plain(model, ids, labels, attention_mask=mask)
    assert_same(chunked(model, ids, labels, 16, attention_mask=mask), want, rounding(model))
