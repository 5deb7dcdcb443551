"""Padding to a fixed length, or a batch that lost its longest row: no row fills the first slots."""

import pytest
import torch
from cache_cases import ALL, feed, left_padding, make
from models import build, tokens
from noise import distance, model_budget

import lcpatch
from lcpatch.caches.evicting import EvictingLayer

PADS = 17
FIXED = [name for name in ALL if name != "s2"]
SIZES = [30, *[1] * 9, 3, *[1] * 20]


def alone(name, model, ids):
    return feed(model, ids[:, PADS:], make(name, model, small=True), [SIZES[0] - PADS, *SIZES[1:]])


@pytest.mark.parametrize("options", [{}, {"compiled": True}], ids=["", "compiled"])
@pytest.mark.parametrize("name", FIXED)
def test_the_logits_are_those_without_padding_and_a_file_brings_them_back(name, options, tmp_path):
    model, end = build(), sum(SIZES)
    ids, mask = tokens(1, end), left_padding([PADS], end)
    want, budget = alone(name, model, ids), model_budget(model, ids)
    cache = make(name, model, small=True, **options)
    first = feed(model, ids[:, :32], cache, [30, 1, 1], mask[:, :32])
    assert distance(first[:, PADS:], want[:, : 32 - PADS]) <= budget
    for layer in cache.layers:
        if isinstance(layer, EvictingLayer):
            layer.leave_fixed()
            assert layer.slots.length == max(layer.counts) == 32 - PADS
    cache = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for n in range(32, 39):
        with torch.no_grad():
            step = {"attention_mask": mask[:, : n + 1], "position_ids": position[:, n : n + 1]}
            got = model(ids[:, n : n + 1], past_key_values=cache, **step).logits
        assert distance(got, want[:, n - PADS : n - PADS + 1]) <= budget


@pytest.mark.parametrize("options", [{}, {"compiled": True}], ids=["", "compiled"])
@pytest.mark.parametrize("name", FIXED)
def test_a_batch_goes_on_without_its_longest_row(name, options):
    model, end = build(), 40
    ids, mask = tokens(2, end), left_padding([0, PADS], end)
    want = feed(model, ids[1:, PADS:], make(name, model, small=True), [20 - PADS, *[1] * 20])
    cache = make(name, model, small=True, **options)
    feed(model, ids[:, :22], cache, [20, 1, 1], mask[:, :22])
    cache.batch_select_indices(torch.tensor([1]))
    for n in range(22, end):
        with torch.no_grad():
            position = torch.tensor([[n - PADS]])
            step = {"attention_mask": mask[1:, : n + 1], "position_ids": position}
            got = model(ids[1:, n : n + 1], past_key_values=cache, **step).logits
        assert distance(got, want[:, n - PADS : n - PADS + 1]) <= model_budget(model, ids)


@pytest.mark.parametrize("name", FIXED)
def test_a_crop_into_the_pads(name):
    model = build()
    ids, mask = tokens(1, 60), left_padding([PADS], 60)
    want = feed(model, ids[:, PADS:], make(name, model, small=True), [8, *[1] * 35])
    cache = make(name, model, small=True)
    feed(model, ids[:, :30], cache, [30], mask[:, :30])
    cache.crop(-20)
    position, seen = (mask.cumsum(-1) - 1).clamp(min=0), 10
    for size in [15, *[1] * 35]:
        part = slice(seen, seen + size)
        with torch.no_grad():
            step = {"attention_mask": mask[:, : part.stop], "position_ids": position[:, part]}
            got = model(ids[:, part], past_key_values=cache, **step).logits
        real = mask[:, part].bool()
        assert distance(got[real], want[:, max(seen - PADS, 0) : part.stop - PADS][0]) <= model_budget(model, ids)
        seen += size


@pytest.mark.parametrize("name", FIXED)
def test_a_batch_that_lost_its_longest_row_while_a_step_was_recorded(name, tmp_path):
    model = build()
    ids, mask = tokens(2, 40), left_padding([0, PADS], 40)
    want = feed(model, ids[1:, PADS:], make(name, model, small=True), [20 - PADS, *[1] * 20])
    cache = make(name, model, small=True)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    feed(model, ids[:, :20], cache, [20], mask[:, :20])
    for layer in cache.layers:
        if isinstance(layer, EvictingLayer):
            layer.activate_past_recording()
    with torch.no_grad():
        step = {"attention_mask": mask[:, :23], "position_ids": position[:, 20:23]}
        model(ids[:, 20:23], past_key_values=cache, **step)
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-3)
    cache = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    for n in range(20, 40):
        with torch.no_grad():
            step = {"attention_mask": mask[1:, : n + 1], "position_ids": position[1:, n : n + 1]}
            got = model(ids[1:, n : n + 1], past_key_values=cache, **step).logits
        assert distance(got, want[:, n - PADS : n - PADS + 1]) <= model_budget(model, ids)
