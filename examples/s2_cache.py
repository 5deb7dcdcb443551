"""The cache of Sparsely-Sharded attention: it frees what the pattern never reads, and gives a full cache's tokens.

python examples/s2_cache.py
"""

from pydoc_data.topics import topics

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lcpatch


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ids = torch.tensor([list(topics["compound"][:1500].encode())])

    lcpatch.apply(model, "s2", block_size=16, local_blocks=4, stride=8)
    full, cache = DynamicCache(config=model.config), lcpatch.S2Cache(model)
    want, out = (model.generate(ids, past_key_values=c, max_new_tokens=16, do_sample=False) for c in (full, cache))
    held = sum(x.nbytes for layer in full.layers for x in (layer.keys, layer.values))
    print(f"a full cache holds {held:,} bytes, S2Cache {cache.memory()['device']:,}")
    print(f"the same tokens: {torch.equal(want, out)}")


if __name__ == "__main__":
    main()
