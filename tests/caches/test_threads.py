"""One model, several threads: each generates with a cache of its own, as a server of several conversations does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cache_cases import ALL, LENGTH, make, make_model
from models import tokens


@pytest.mark.parametrize("name", ALL)
def test_threads_that_meet_between_a_layers_begin_and_its_attention(name):
    model, texts = make_model(name), [tokens(1, LENGTH, seed=seed) for seed in (1, 2)]

    def generate(ids):
        return model.generate(ids, past_key_values=make(name, model, small=True), max_new_tokens=4, do_sample=False)

    want = [generate(ids) for ids in texts]
    together = threading.Barrier(2, timeout=20)

    def meet(*_):
        together.wait()

    model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(generate, texts))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
