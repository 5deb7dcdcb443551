"""A long text on three tiers: a budget on the fast one, some pages in host memory, every page on disk.

    python examples/tiered_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse
import tempfile
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

with tempfile.TemporaryDirectory() as folder:  # scratch: the file has no name, and is gone with the cache
    cache = lcpatch.TieredCache(model, budget=256, page=16, recent=32, disk=folder, host_bytes=1 << 18)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
    stats, held = cache.stats(), cache.memory()
print(f"after {ids.shape[1]} tokens it writes {tokenizer.decode(out[0, ids.shape[1] :])!r}")
print(f"bytes per tier: {held}")
print(f"{stats['attended']} tokens read of {stats['kept']}; {stats['hit_rate']:.0%} of the pages were there")
print(f"{stats['fetched_ahead']} fetched ahead, {stats['from_host']} from memory, {stats['from_disk']} from disk")
lcpatch.remove(model)  # the model's attention is its own again
