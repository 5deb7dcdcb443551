"""Attention sinks: a window alone fails once a text's first tokens have left it; a few sinks hold it together.

    python examples/sink.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --model it takes a tiny random one whose tokens are bytes: it has learned no sinks, so all arms do alike.
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lcpatch
from lcpatch.eval import perplexity, token_nll

TEXT = topics["compound"]
LENGTH, WINDOW = 1024, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model, ids, decode = load(parser.parse_args().model)

    arms = {
        "dense": None,
        f"window {WINDOW}, no sinks": lcpatch.Sink(num_sinks=0, window=WINDOW),
        f"window {WINDOW - 4}, 4 sinks": lcpatch.Sink(num_sinks=4, window=WINDOW - 4),
    }
    for name, pattern in arms.items():
        if pattern is not None:
            lcpatch.apply(model, pattern)
        late = token_nll(model, ids)[:, WINDOW:]  # tokens whose window no longer reaches the beginning
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
        print(f"{name:22} perplexity past the window {perplexity(late):8.2f}   writes {decode(out[0, LENGTH:])!r}")


def load(name: str | None):
    """A model, a text of LENGTH tokens, and what turns tokens into text."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
        return model, tokenizer(TEXT, return_tensors="pt").input_ids[:, :LENGTH], tokenizer.decode
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 2, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    ids = torch.tensor([list(TEXT[:LENGTH].encode())])
    return model.eval(), ids, lambda tokens: bytes(tokens.tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
