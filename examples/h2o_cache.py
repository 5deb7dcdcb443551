"""A long text read in chunks through a cache that keeps a fifth of it, then continued; the cache saved and loaded.

    python examples/h2o_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch

TEXT = topics["compound"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids, decode = load(parser.parse_args().model)

    cache = lcpatch.H2OCache(model, budget=0.2)  # a fifth of the prompt's tokens; or an integer: tokens per KV head
    out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False, prefill_chunk_size=256)
    print(f"after {ids.shape[1]} tokens it writes {decode(out[0, ids.shape[1] :])!r}")
    print(f"{cache.stats()['seen']} tokens seen, {cache.stats()['kept']} kept per KV head, {cache.memory()} bytes")

    with tempfile.TemporaryDirectory() as folder:  # read once, continue in any later process
        path = cache.save(Path(folder) / "prefix.safetensors")
        loaded = lcpatch.load_cache(path, model)
        more = model.generate(out, past_key_values=loaded, max_new_tokens=8, do_sample=False)
    print(f"loaded from a file, it goes on with {decode(more[0, out.shape[1] :])!r}")
    lcpatch.remove(model)  # the model's attention is its own again


def load(name: str | None):
    """A model, 1,000 tokens of text, and what turns tokens into text."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
        return model, tokenizer(TEXT, return_tensors="pt").input_ids[:, :1000], tokenizer.decode
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    ids = torch.tensor([list(TEXT[:1000].encode())])
    return model.eval(), ids, lambda tokens: bytes(tokens.tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
