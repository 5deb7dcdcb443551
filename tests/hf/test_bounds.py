"""Where documents begin is looked up once a forward, and never remembered wrongly."""

import gc

import torch
from models import SHORT, TOKENS, build, tokens
from noise import distance, model_budget
from schedules import plain

import lcpatch
from lcpatch.hf import bounds, mask


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def test_one_position_tensor_for_several_batches_and_masks():
    """The look-up is remembered by the tensor's identity, but not beyond what it was made for."""
    model = build()
    allowed = model_budget(model, tokens())
    lcpatch.apply(model, "s2", **SHORT["s2"])
    positions = packed_positions(40, TOKENS - 40)
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, -9:] = 0
    with torch.no_grad():
        for batch, attention_mask in [(2, None), (3, None), (2, padding), (1, None), (2, None)]:
            ids = tokens(batch)
            logits = model(ids, position_ids=positions, attention_mask=attention_mask).logits
            for row, doc in zip(logits, ids, strict=True):
                assert distance(row[:40], plain(model, doc[:40])) <= allowed
        positions.copy_(torch.arange(TOKENS)[None])  # in place: one document now
        ids = tokens()
        assert distance(model(ids, position_ids=positions).logits[0], plain(model, ids[0])) <= allowed
        with torch.inference_mode():
            positions = packed_positions(40, TOKENS - 40)
            assert distance(model(ids, position_ids=positions).logits[0, :40], plain(model, ids[0, :40])) <= allowed


def test_nothing_is_remembered_after_the_forward():
    model = lcpatch.apply(build("gemma2"), "s2", **SHORT["s2"])
    attention_mask = torch.ones(1, TOKENS, dtype=torch.long)
    attention_mask[0, :5] = 0
    model(tokens(), attention_mask=attention_mask, position_ids=packed_positions(40, TOKENS - 40))
    gc.collect()
    assert not len(bounds._documents)
    assert not len(mask._expanded)
    assert not len(mask._unpacked)
