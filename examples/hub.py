"""Save a patched model and load it again, look at its card, continue a saved cache: all in a folder.

    python examples/hub.py [--out FOLDER]

`lcpatch.push_to_hub(model, "me/model-s2")` does the same towards the Hub, and `from_pretrained("me/model-s2")` from it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lcpatch
from lcpatch.hub import export_generate, preview_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    out = parser.parse_args().out
    model = lcpatch.apply(tiny_model(), "s2", block_size=16, local_blocks=2, stride=4, layers="every_2")
    ids = torch.arange(200)[None] % 256

    lcpatch.save_pretrained(model, out / "model-s2")
    loaded = lcpatch.from_pretrained(out / "model-s2")
    print(f"loaded from {out / 'model-s2'}: equal logits: {torch.equal(loaded(ids).logits, model(ids).logits)}")

    card, *pictures = preview_card(out / "model-s2", out / "card", about={"license": "apache-2.0"})
    print(f"its card: {card}, {len(card.read_text().splitlines())} lines, with {pictures[0].name}")

    plan = lcpatch.push_to_hub(model, "me/model-s2", dry_run=True)
    print(f"a push would bring {len(plan.files)} files in one commit: {', '.join(plan.files)}")

    cache = lcpatch.H2OCache(model, budget=64)
    model(ids, past_key_values=cache)
    cache.save(out / "book.safetensors")
    again = lcpatch.load_cache(out / "book.safetensors", model)
    read = again.get_seq_length()
    saved, kept = (model(ids[:, :1], past_key_values=c).logits for c in (again, cache))
    print(f"a saved cache that has read {read} tokens goes on as the one in memory: {torch.equal(saved, kept)}")

    files = export_generate("h2o", out / "h2o", budget=64)
    print(f"for generate(custom_generate=…): {', '.join(file.name for file in files)}")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


if __name__ == "__main__":
    main()
