"""A long text of which nothing is lost: each generated token reads the pages that fit its query best.

    python examples/retrieval_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

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
ids = tokenizer(topics["compound"], return_tensors="pt").input_ids[:, :1000]

full = model.generate(ids, max_new_tokens=16, do_sample=False)
print(f"reading everything, it writes {tokenizer.decode(full[0, ids.shape[1] :])!r}")

# Pages are scored by their mean key, or by bounds of their keys; or by a trained scorer: recipes/retrieval.py
for options in ({}, {"scorer": "quest"}, {"offload": True, "codec": "int8"}):
    cache = lcpatch.RetrievalCache(model, budget=256, recent=32, **options)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
    stats, text = cache.stats(measure=True), tokenizer.decode(out[0, ids.shape[1] :])
    read = f"{stats['attended']} of {stats['kept']} tokens, {stats['mass_recalled']:.0%} of the attention"
    print(f"{options}: reading {read}, it writes {text!r}")
print(f"bytes per tier: {cache.memory()}")  # of the last one, whose pages lie in host memory
lcpatch.remove(model)  # the model's attention is its own again
