"""A long text read in chunks through a cache that keeps a fifth of it, then continued; the cache saved and loaded.

    python examples/h2o_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

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

cache = lcpatch.H2OCache(model, budget=0.2)  # a fifth of the prompt's tokens; or an integer: tokens per KV head
out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False, prefill_chunk_size=256)
print(f"after {ids.shape[1]} tokens it writes {tokenizer.decode(out[0, ids.shape[1] :])!r}")
stats, held = cache.stats(), cache.memory()["device"]
print(f"{stats['seen']} tokens seen, {stats['kept']} kept per KV head, {held:,} bytes")
print(f"{stats['mass_kept']:.0%} of the attention given so far went to those that are kept")

with tempfile.TemporaryDirectory() as folder:  # read once, continue in any later process
    loaded = lcpatch.load_cache(cache.save(f"{folder}/prefix.safetensors"), model)
more = model.generate(out, past_key_values=loaded, max_new_tokens=8, do_sample=False)
print(f"loaded from a file, it goes on with {tokenizer.decode(more[0, out.shape[1] :])!r}")
lcpatch.remove(model)  # the model's attention is its own again
