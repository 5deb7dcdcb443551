"""Endless generation at fixed memory: the first tokens and a window of the newest, positions counted within them.

    python examples/sink_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch

TEXT = "In the beginning there was a cache, and it grew with every token that anyone ever wrote."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids, decode = load(parser.parse_args().model)

    cache = lcpatch.SinkCache(model, budget=64, num_sinks=4)
    for _ in range(4):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=50, do_sample=False)
        stats = cache.stats()
        print(f"{stats['seen']} tokens seen, {stats['kept']} kept, {cache.memory()['device']:,} bytes")
    print(f"it wrote {decode(ids[0, -50:])!r} last")
    lcpatch.remove(model)


def load(name: str | None):
    """A model, a short text in tokens, and what turns tokens into text."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return (
            AutoModelForCausalLM.from_pretrained(name),
            tokenizer(TEXT, return_tensors="pt").input_ids,
            tokenizer.decode,
        )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return model, torch.tensor([list(TEXT.encode())]), lambda tokens: bytes(tokens.tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
