"""`generate` chooses what repeated full forwards under the same pattern would choose."""

import pytest
import torch
from models import SHORT, build, tokens
from schedules import pad
from torch import Tensor, nn

import lcpatch

NEW = 9
PROMPTS = (47, 30)
METHODS = tuple(lcpatch.methods())


def patched(method: str, family: str = "llama") -> nn.Module:
    return lcpatch.apply(build(family), method, mode="always", **SHORT.get(method, {}))


def prompts() -> list[Tensor]:
    return [tokens(1, n, seed=n)[0] for n in PROMPTS]


def argmax_loop(model: nn.Module, prompt: Tensor) -> list[int]:
    """Greedy decoding by the definition: a full forward for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids[len(prompt) :].tolist()


def generate(model: nn.Module, docs: list[Tensor], **settings) -> list[list[int]]:
    """New tokens of each prompt, generated in one left-padded batch."""
    ids, mask = pad(docs, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"prompt_lookup_num_tokens": 3},  # several candidates a step, and a cache that is cropped
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default",
)
def test_greedy(method: str, settings: dict):
    model = patched(method)
    docs = prompts()
    if "prompt_lookup_num_tokens" in settings:
        docs = [torch.cat([docs[0], docs[0]])]  # something to look up; transformers takes one prompt only here
    assert generate(model, docs, **settings) == [argmax_loop(model, doc) for doc in docs]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_in_hybrid_models(family: str, cache: str):
    """Whose masks `generate` makes ahead of the forward, one for every kind of layer."""
    model = patched("s2", family)
    settings = {} if cache == "dynamic" else {"cache_implementation": cache}
    assert generate(model, prompts(), **settings) == [argmax_loop(model, doc) for doc in prompts()]


@pytest.mark.parametrize("method", METHODS)
def test_the_pattern_changes_what_is_generated(method: str):
    """Else the tests above would pass with dense attention."""
    model = patched(method)
    sparse = generate(model, prompts())
    assert generate(lcpatch.remove(model), prompts()) != sparse


@pytest.mark.parametrize("method", METHODS)
def test_beams(method: str):
    """Three beams of a left-padded batch, cached and reordered, are those of each prompt alone without a cache."""
    model = patched(method)
    together = generate(model, prompts(), num_beams=3)
    alone = [generate(model, [doc], num_beams=3, use_cache=False)[0] for doc in prompts()]
    assert together == alone


def test_static_cache_can_be_used_again():
    model = patched("s2")
    first = generate(model, prompts(), cache_implementation="static")
    generate(model, [tokens(1, 20, seed=5)[0]], cache_implementation="static")
    assert generate(model, prompts(), cache_implementation="static") == first
