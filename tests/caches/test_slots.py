"""Buffers that grow: how much of them lies unused, what that costs in copies, and that they are loaded as they were."""

import pytest
import torch
from cache_cases import feed, make, make_model
from models import tokens

import lcpatch
from lcpatch.caches import slots
from lcpatch.caches.growing import GrowingLayer
from lcpatch.caches.pages import Pages
from lcpatch.caches.slots import GRAIN, LEAP, Slots, enlarged, grown

LONGEST = 140_000
CHUNKS = {"whole": LONGEST, "8K": 8192, "odd": 777}


def growing():
    """Capacities of a `GrowingLayer` that is given tokens."""
    layer = GrowingLayer()

    def give(num):
        layer.update(*torch.zeros(2, 1, 1, num, 1))
        return layer.memory() // 8

    return give


def paged():
    pages = Pages(32)
    pages.lengths = [0]

    def give(num):
        list(pages.append(*torch.zeros(2, 1, 1, num, 1), [0]))
        return pages.nbytes()["device"] // 8

    return give


def slotted():
    own = Slots({"keys": torch.zeros(1, 1, 0, 1)}, 0)

    def give(num):
        own.append({"keys": torch.zeros(1, 1, num, 1)}, grown(own.length + num, None))
        return own.nbytes() // 4

    return give


def unused(tokens):
    """What may lie unused behind so many tokens."""
    return max(min(tokens // 2, LEAP), tokens // 8) + GRAIN


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("make_buffer", [growing, paged, slotted])
def test_at_most_an_eighth_of_a_long_buffer_lies_unused(make_buffer, size):
    give, held = make_buffer(), 0
    while held < LONGEST:
        held += CHUNKS[size]
        assert held <= give(CHUNKS[size]) <= held + unused(held)
    assert unused(held) <= held / 8 + GRAIN


def test_growing_by_a_half_would_be_seen(monkeypatch):
    """Negative control: 128K tokens in chunks of 8K once took a buffer of 187K."""
    for module in (slots, lcpatch.caches.pages):
        monkeypatch.setattr(module, "enlarged", lambda slots: slots + slots // 2)
    with pytest.raises(AssertionError):
        test_at_most_an_eighth_of_a_long_buffer_lies_unused(paged, "8K")


def test_token_by_token_a_token_is_moved_eight_times_at_most():
    capacity, moved = GRAIN, 0
    for bound, limit in ((8192, 2), (1 << 20, 8)):
        while capacity < bound:
            moved, capacity = moved + capacity, enlarged(capacity)
            assert moved <= limit * capacity


@pytest.mark.parametrize("name", ["retrieval", "tiered", "h2o"])
def test_a_cache_that_was_cropped_can_be_saved(name, tmp_path):
    """Its buffers are larger than what it holds would ever ask for."""
    model = make_model(name, max_position_embeddings=2048)
    options = {"dense_layers": 1} if name == "retrieval" else {}
    cache, ids = make(name, model, **options), tokens(1, 1600)
    feed(model, ids[:, :1500], cache, [1500])
    cache.crop(-1400)
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    assert torch.equal(*(feed(model, ids[:, 100:120], x, [10, *[1] * 10]) for x in (loaded, cache)))
