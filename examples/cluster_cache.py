"""A long text whose keys are merged into centroids, a fifth of them left; and what the log of their sizes is for.

    python examples/cluster_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

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

for log_size in (True, False):  # without it, a centroid of eight tokens would count as one
    cache = lcpatch.ClusterCache(model, budget=0.2, log_size=log_size)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
    print(f"log_size={log_size}: after {ids.shape[1]} tokens it writes {tokenizer.decode(out[0, ids.shape[1] :])!r}")

sizes = cache.layers[0].slots["joined"][0, 0] + 1  # tokens that each slot of the first layer's first head stands for
print(f"{cache.stats()['kept']} slots for {int(sizes.sum())} tokens; the largest stands for {int(sizes.max())}")
print(f"{cache.memory()['device']:,} bytes")
lcpatch.remove(model)  # the model's attention is its own again
