"""Rows that are not alike: who writes to some of them names those to the device once, not at every tensor."""

import pytest
import torch
from cache_cases import feed, left_padding, make, make_model
from models import tokens
from torch.utils._python_dispatch import TorchDispatchMode

from lcpatch.caches.rows import alike, as_index

MOST = 3  # a layer: each of the two groups of rows, and where they begin


class Lists(TorchDispatchMode):
    """How many lists became tensors, an index that is one too: to a GPU each is a copy that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def lists_of_a_step(name, pads, **options):
    """Of one token, in the middle of a page."""
    model, ids, mask = make_model(name), tokens(2, 63), left_padding(pads, 63)
    cache, position = make(name, model, small=True, **options), (mask.cumsum(-1) - 1).clamp(min=0)
    feed(model, ids[:, :62], cache, [60, 1, 1], mask[:, :62])
    with torch.no_grad(), Lists() as lists:
        model(ids[:, 62:], past_key_values=cache, attention_mask=mask, position_ids=position[:, 62:])
    return lists.count / model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["cluster", "retrieval", "s2"])
def test_a_token_of_padded_rows_names_them_once(name):
    assert lists_of_a_step(name, [0, 9]) - lists_of_a_step(name, [0, 0]) <= MOST


def test_merging_names_rows_once_whatever_a_slot_holds():
    assert lists_of_a_step("cluster", [0, 9], codec="int8") == lists_of_a_step("cluster", [0, 9])


def test_some_rows_are_a_tensor_there_and_all_rows_a_slice():
    groups, there = alike([3, 1, 3]), torch.device("meta")
    assert groups == [[0, 2], [1]]
    assert as_index(groups[0], 3, there).device == there
    assert as_index([0, 1, 2], 3, there) == slice(None)
