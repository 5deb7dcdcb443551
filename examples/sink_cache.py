"""Endless generation at fixed memory: the first tokens and a window of the newest, positions counted within them.

    python examples/sink_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

import lcpatch

parser = argparse.ArgumentParser()
parser.add_argument("--model")
if name := parser.parse_args().model:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
else:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2, eos_token_id=None)
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), ByT5Tokenizer(extra_ids=0)
ids = tokenizer(topics["compound"], return_tensors="pt").input_ids[:, :80]

cache = lcpatch.SinkCache(model, budget=64, num_sinks=4)
for _ in range(4):
    ids = model.generate(ids, past_key_values=cache, max_new_tokens=50, do_sample=False)
    stats, held = cache.stats(), cache.memory()["device"]
    print(f"{stats['seen']} tokens seen, {stats['kept']} kept, {held:,} bytes")
print(f"it wrote {tokenizer.decode(ids[0, -50:])!r} last")
lcpatch.remove(model)  # the model's attention is its own again
