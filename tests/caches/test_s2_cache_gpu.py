"""The evicting cache on a GPU, where decoding runs through the split-K kernel in sparse and in dense layers."""

import pytest
import torch
from models import build, tokens
from noise import distance, model_budget

import lcpatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATTERN = {"block_size": 16, "local_blocks": 2, "stride": 3}


@pytest.mark.parametrize("layers", [None, "every_2"])
@torch.no_grad()
def test_decoding_gives_the_full_forward(layers):
    model = build("llama").cuda()
    ids = tokens(2, 300).cuda()
    budget = model_budget(model, ids)
    lcpatch.apply(model, "s2", layers=layers, **PATTERN)
    want = model(ids, use_cache=False).logits
    cache = lcpatch.S2Cache(model)
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([200, *[1] * 100], 1)], 1)
    assert distance(got, want) <= budget


@pytest.mark.parametrize("layers", [None, "every_2"])
def test_generate_left_padded(layers):
    model = build("llama").cuda()
    lcpatch.apply(model, "s2", layers=layers, **PATTERN)
    ids, mask = tokens(3, 120).cuda(), torch.ones(3, 120, dtype=torch.long).cuda()
    mask[0, :37], mask[1, :64] = 0, 0
    options = {"max_new_tokens": 60, "do_sample": False, "attention_mask": mask}
    assert torch.equal(
        model.generate(ids, past_key_values=lcpatch.S2Cache(model), **options), model.generate(ids, **options)
    )
