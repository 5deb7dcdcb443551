"""LoRA+: what is trained, in one adapter that comes back and merges, tied or not, for every family."""

import copy
import warnings

import peft
import pytest
import torch
from models import FAMILIES, build, tokens
from noise import distance, model_budget
from transformers import GPT2Config, GPT2LMHeadModel

import lcpatch
from lcpatch.core.errors import UnsupportedModelError
from lcpatch.hf.models import unwrap
from lcpatch.hf.state import SINK_LOGIT
from lcpatch.training import lora

TIED = [(f, t) for f in FAMILIES for t in (False, True) if (f, t) not in [("gemma3_text", False), ("gpt_neox", True)]]
PROJECTIONS = {"phi3": ["o_proj", "qkv_proj"], "gpt_neox": ["dense", "query_key_value"]}


def trained(model, steps: int = 3, tune: str = "lora+"):
    """`model` after a few steps large enough to matter."""
    model = lora.prepare(model, tune).train()
    optimizer = torch.optim.AdamW(list(lora.trainable(model)), lr=1e-2)
    for _ in range(steps):
        model(tokens(2), labels=tokens(2), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(("family", "tied"), TIED)
def test_one_adapter_holds_all_that_was_trained(family: str, tied: bool, tmp_path):
    base, ids = build(family, tie_word_embeddings=tied), tokens(2)
    assert lora.projections(base) == PROJECTIONS.get(family, ["k_proj", "o_proj", "q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = trained(copy.deepcopy(base))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "norm" in n or "embed" in n for n in names)
    assert sum("norm" in n for n in names) == sum("norm" in n for n, _ in base.named_parameters())
    with torch.no_grad():
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, want)
        allowed = model_budget(merged := lora.merge(model), ids)
        assert distance(merged(ids).logits, want) <= allowed
        assert distance(base(ids).logits, want) > 1000 * allowed
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tied
    if not tied:
        assert torch.equal(head.weight, base.get_output_embeddings().weight)


def test_projections_that_share_a_name_with_others():
    """GPT-2's MLP has a c_proj too; and its head, which peft would train apart, is refused."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=61))
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=lora.projections(model)))
    adapted = [n for n, m in wrapped.named_modules() if hasattr(m, "lora_A")]
    assert [n.split(".")[-2:] for n in adapted] == [["attn", "c_attn"], ["attn", "c_proj"]]
    with pytest.raises(UnsupportedModelError, match=r"train them apart here; load it with tie_word_embeddings=False"):
        lora.prepare(model)


def test_what_is_trained_is_fp32_and_the_stream_is_not():
    """An update of 1e-5 is lost on a bf16 weight of 1; in fp32 it is not, and hidden states stay bf16."""
    model = build().to(torch.bfloat16)
    wrapped = lora.prepare(model)
    assert {p.dtype for p in lora.trainable(wrapped)} == {torch.float32}
    assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {torch.bfloat16}
    ids = tokens()

    seen = []
    for name, module in wrapped.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    def dtypes() -> tuple[set[torch.dtype], set[torch.dtype]]:
        """Of the residual stream, and of what adapters get from the norms."""
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = wrapped(ids, output_hidden_states=True, use_cache=False).hidden_states
        return {h.dtype for h in hidden[:-1]}, set(seen)

    wide = {torch.float32}, {torch.float32}
    assert dtypes() == wide
    with lora.keep_dtype(wrapped):
        assert dtypes() == ({torch.bfloat16}, {torch.bfloat16})
    assert dtypes() == wide
    lone = lora.prepare(build())
    with lora.keep_dtype(lone):  # nothing is frozen in half precision
        assert not any(module._forward_hooks for module in lone.modules())


def test_a_kept_dtype_changes_no_value_of_a_forward():
    """Each projection rounds its input in any case; here the residual stream is bf16 on both sides."""
    wrapped = lora.prepare(build().to(torch.bfloat16))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what LoRA is given
            torch.nn.init.normal_(parameter, std=0.5)
    ids, embeddings = tokens(), unwrap(wrapped).get_input_embeddings()
    with torch.autocast("cpu", torch.bfloat16), lora.keep_dtype(wrapped):
        kept = wrapped(ids, use_cache=False).logits
    hook = embeddings.register_forward_hook(lambda module, args, out: out.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        stock = wrapped(ids, use_cache=False).logits
    hook.remove()
    assert torch.equal(kept, stock)


def test_sink_logits_train_beside_an_adapter():
    for order in ("patch first", "wrap first"):
        model = build()
        if order == "patch first":
            model = lora.prepare(lcpatch.apply(model, "sf", sinks="logit:0"))
        else:
            model = lcpatch.apply(lora.prepare(model), "sf", sinks="logit:0")
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if n.endswith(SINK_LOGIT)]
        assert len(grads) == 2
        assert all(grad.abs().min() > 0 for grad in grads)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"tune='lora\+\+' is not one of lora\+, lora, full"):
        lora.prepare(build(), "lora++")
    with pytest.raises(ValueError, match=r"r=0 and alpha=16 of at least 1"):
        lora.prepare(build(), r=0)
    full = lora.prepare(build().to(torch.bfloat16), "full")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())
    assert lora.merge(full) is full
