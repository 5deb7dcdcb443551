"""A model that its user compiled: the graph stops at what a cache decides on the host, and goes on behind it."""

import pytest
import torch
from cache_cases import ALL, LENGTH, left_padding, make, make_model
from models import tokens

QUICK = ("h2o",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ALL])
def test_it_generates_what_it_generates_uncompiled_and_is_not_compiled_anew(name):
    model = make_model(name)
    ids, mask = tokens(2, LENGTH), left_padding([0, 31])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    want = model.generate(ids, past_key_values=make(name, model, small=True), **options)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend)
    for _ in range(2):
        compiled = len(graphs)
        assert torch.equal(model.generate(ids, past_key_values=make(name, model, small=True), **options), want)
    assert len(graphs) == compiled
