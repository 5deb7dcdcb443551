"""Sparsely-Sharded attention on every second layer, and text generated under it.

    python examples/s2.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: the text is noise, everything else is as it would be.
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch

TEXT = topics["compound"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids, decode = load(parser.parse_args().model)

    # S2 mixes dense and sparse layers: "every_2" makes layers 0, 2, 4, … sparse. Blocks are small as the text is short.
    pattern = lcpatch.S2(block_size=16, local_blocks=4, stride=4)
    lcpatch.apply(model, pattern, layers="every_2")

    layers = lcpatch.report(model)
    sparse = [layer.index for layer in layers if layer.method]
    print(f"layers {sparse} of {len(layers)} follow {pattern}")
    out = model.generate(ids, max_new_tokens=16, do_sample=False)
    print(f"after {ids.shape[1]} tokens it writes {decode(out[0, ids.shape[1] :])!r}")

    lcpatch.remove(model)
    dense = model.generate(ids, max_new_tokens=16, do_sample=False)
    print(f"without the patch it writes {decode(dense[0, ids.shape[1] :])!r}")


def load(name: str | None):
    """A model, 512 tokens of text, and what turns tokens into text."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
        return model, tokenizer(TEXT, return_tensors="pt").input_ids[:, :512], tokenizer.decode
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    ids = torch.tensor([list(TEXT[:512].encode())])
    return model.eval(), ids, lambda tokens: bytes(tokens.tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
