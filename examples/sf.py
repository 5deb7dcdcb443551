"""SinkLoRA's SF-Attn on packed documents: each has groups and sinks of its own, and none sees another.

    python examples/sf.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes.
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch

DOCUMENTS = [topics["pass"], topics["break"], topics["while"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, documents = load(parser.parse_args().model)
    # Groups are a quarter of each document, whatever its length; four sinks at the start of each.
    lcpatch.apply(model, "sf", group_ratio=1 / 4, num_sinks=4)
    model.train()

    # One row, no padding: positions that start anew tell the documents apart, and no token predicts across a border.
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    labels = packed.masked_fill(positions == 0, -100)
    loss = model(input_ids=packed, position_ids=positions, labels=labels, use_cache=False).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    print(f"{len(documents)} documents of {[d.shape[1] for d in documents]} tokens in one row of {packed.shape[1]}")
    print(f"packed: loss {loss.item():.6f}, gradient norm {norm.item():.4f}")

    with torch.no_grad():
        losses = [model(input_ids=d, labels=d, use_cache=False).loss for d in documents]
    weights = torch.tensor([d.shape[1] - 1.0 for d in documents])
    alone = (torch.stack(losses) * weights).sum() / weights.sum()
    print(f"one by one: loss {alone.item():.6f}, a difference of {abs(loss.item() - alone.item()):.1e}")


def load(name: str | None):
    """A model, and the documents as tokens [1, T]."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
        return model, [tokenizer(text, return_tensors="pt").input_ids for text in DOCUMENTS]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
    return model, [torch.tensor([list(text.encode())]) for text in DOCUMENTS]


if __name__ == "__main__":
    main()
