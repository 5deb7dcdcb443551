"""A long text on three tiers: a budget on the fast one, some pages in host memory, every page on disk.

    python examples/tiered_cache.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch

TEXT = topics["compound"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids, decode = load(parser.parse_args().model)

    with tempfile.TemporaryDirectory() as folder:  # scratch: the file has no name, and is gone with the cache
        cache = lcpatch.TieredCache(model, budget=256, page=16, recent=32, disk=folder, host_bytes=1 << 18)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
        print(f"after {ids.shape[1]} tokens it writes {decode(out[0, ids.shape[1] :])!r}")
        print(f"bytes per tier: {cache.memory()}")
        stats = cache.stats()
        print(f"{stats['attended']} tokens read of {stats['kept']}; {stats['hit_rate']:.0%} of the pages were there")
        print(
            f"{stats['fetched_ahead']} fetched ahead, {stats['from_host']} from memory, {stats['from_disk']} from disk"
        )
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
