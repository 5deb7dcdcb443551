"""LongLoRA's shifted attention: train LoRA weights sparsely, then use the model densely.

    python examples/shift.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes.
"""

import argparse
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch
from lcpatch.eval import perplexity, token_nll

TEXT = topics["compound"]
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids = load(parser.parse_args().model)
    before = perplexity(token_nll(model, ids))

    # LongLoRA's "LoRA+": adapters on attention, and embeddings and norms trained in full.
    targets, whole = ["q_proj", "k_proj", "v_proj", "o_proj"], ["embed_tokens", "norm"]
    tied = model.config.tie_word_embeddings
    model = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=whole, ensure_weight_tying=tied))
    lcpatch.apply(model, "shift", group_ratio=1 / 4)  # mode="train": sparse while training, dense otherwise

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {STEPS} steps through {lcpatch.report(model)[0].runs}; last loss {loss.item():.2f}")

    model.eval()
    print(f"runs through {lcpatch.report(model)[0].runs}: {lcpatch.report(model)[0].why}")
    print(f"dense perplexity on the training text: {before:.1f} before, {perplexity(token_nll(model, ids)):.1f} after")


def load(name: str | None):
    """A model, and 512 tokens of text."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name), tokenizer(TEXT, return_tensors="pt").input_ids[:, :512]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, tie_word_embeddings=True, **sizes))
    return model.eval(), torch.tensor([list(TEXT[:512].encode())])


if __name__ == "__main__":
    main()
