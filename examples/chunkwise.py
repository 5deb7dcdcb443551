"""Train on a text longer than memory holds at once: the gradient is exact, a chunk's activations are all there is."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lcpatch.training import chunkwise, spaco

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).train()
ids = torch.randint(0, 1000, (1, 1024))


def gradient() -> torch.Tensor:
    """The model's, taken off it."""
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(grads)


model(ids, labels=ids, use_cache=False).loss.backward()
plain = gradient()

# The same, 128 tokens at a time; offload=True keeps keys, values and their gradients in host memory.
loss = chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=128)
difference = (gradient() - plain).norm() / plain.norm()
print(f"SeCO: loss {loss:.4f}, relative difference of the gradient {difference:.1e}")

# Unbiased, at a fraction of the work: each chunk is kept with probability 1/2.
keep = {"estimator": "bernoulli", "keep": 0.5, "generator": torch.Generator().manual_seed(0)}
draws = []
for _ in range(20):
    chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=128, **keep)
    draws.append(gradient())
spread = torch.stack(draws).std(0).norm() / plain.norm()
mean = (torch.stack(draws).mean(0) - plain).norm() / plain.norm()
print(f"SpaCO: {spread:.2f} off in a draw, {mean:.2f} in the mean of 20")

# Which chains of chunks the gradient comes through: what keeping few of them loses.
norms, _ = spaco.chain_norms(model, input_ids=ids, labels=ids, chunk_size=256)
print("|z_p| / |g| by chain length:", " ".join(f"{norm / plain.norm():.3f}" for norm in norms))
