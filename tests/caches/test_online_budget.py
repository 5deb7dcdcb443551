"""A share of a row's tokens: of its prompt, or, where it has none, of the tokens seen so far."""

import math

import pytest
import torch
from cache_cases import feed, left_padding, make_model
from models import build, tokens
from noise import distance, model_budget
from transformers import DynamicCache

import lcpatch
from lcpatch.caches import caches

PAGES = {"page": 4, "recent": 4}
SHARED = {
    "h2o": {"recent": 0.5},
    "cluster": {"recent": 4},
    "sink": {"num_sinks": 2},
    "retrieval": PAGES,
    "tiered": {**PAGES, "codec": None},
}
"""Caches that take a share, and options small enough for short rows."""
every_cache = pytest.mark.parametrize("name", SHARED)
LENGTH = 50


def make(name, model, share, **options):
    return caches.get(name)(model, share, **{**SHARED[name], **options})


def budgets(cache):
    """Tokens that each row of the first layer may keep, or read."""
    layer = cache.layers[0]
    return [n * getattr(layer, "reads", None).page if hasattr(layer, "reads") else n for n in layer.budgets]


@pytest.mark.parametrize("name", ["h2o", "cluster", "sink"])
def test_a_share_of_everything_is_a_full_cache_token_by_token(name):
    model, ids, mask = build(), tokens(2, 40), left_padding([0, 11], 40)
    want = feed(model, ids, DynamicCache(config=model.config), [40], mask)
    got = feed(model, ids, make(name, model, 1.0), [1] * 40, mask)
    assert distance(got[mask.bool()], want[mask.bool()]) <= model_budget(model, ids)


@every_cache
def test_without_a_prompt_it_grows_with_the_text_and_with_one_it_stands_still(name):
    model, ids = build(), tokens(1, LENGTH)
    cache, prompted = make(name, model, 0.5), make(name, model, 0.5)
    feed(model, ids[:, :40], prompted, [40])
    before, sizes = budgets(prompted), set()
    for n in range(LENGTH):
        feed(model, ids[:, n : n + 1], cache, [1])
        wanted = math.ceil((n + 1) / 2)
        layer = cache.layers[0]
        if name in ("retrieval", "tiered"):
            assert budgets(cache) == [max(wanted // 4, layer.reads.least) * 4]
        else:
            most = max(wanted, layer.budget.least)
            assert budgets(cache) == [most]
            assert min(most - layer.budget.slack(most), n + 1) <= layer.counts[0] <= most
            sizes.add(layer.slots.capacity)
        if n >= 40:
            feed(model, ids[:, n : n + 1], prompted, [1])
            assert budgets(prompted) == before
    assert len(sizes) <= 2  # buffers grow geometrically, not by a token
    feed(model, ids[:, :2], cache, [2])  # and a prompt that comes late is one
    feed(model, ids[:, :9], cache, [1] * 9)
    assert budgets(cache) in ([math.ceil((LENGTH + 2) / 2)], [(LENGTH + 2) // 2 // 4 * 4])


@every_cache
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param([1] * 60, marks=pytest.mark.slow),
        pytest.param([30, *[1] * 30], marks=pytest.mark.slow),
        [38, *[1] * 9, 7, *[1] * 6],
    ],
)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, cut):
    """A chunk of pads, or with a row's first token only, is no prompt of that row."""
    model, ids, pads = build(), tokens(3, 60), [0, 37, 11]
    mask, budget = left_padding(pads, 60), model_budget(model, ids)
    got = feed(model, ids, make(name, model, 0.4), cut, mask)
    for row, pad in enumerate(pads):
        ends = [max(sum(cut[: n + 1]) - pad, 0) for n in range(len(cut))]
        sizes = [b - a for a, b in zip([0, *ends], ends, strict=False) if b > a]
        alone = feed(model, ids[row : row + 1, pad:], make(name, model, 0.4), sizes)
        assert distance(got[row : row + 1, pad:], alone) <= budget


@every_cache
def test_it_goes_on_counting_from_a_file_and_for_chosen_rows(name, tmp_path):
    model, ids = make_model(name), tokens(2, LENGTH)
    cache = make(name, model, 0.4)
    feed(model, ids[:, :40], cache, [1] * 40)
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    for x in (cache, loaded):
        x.batch_select_indices(torch.tensor([1, 1, 0]))
    assert torch.equal(*(feed(model, ids[[1, 1, 0], 40:], x, [1] * 10) for x in (cache, loaded)))
    assert budgets(cache) == budgets(loaded) == [LENGTH * 2 // 5] * 3


def test_cropped_to_nothing_it_begins_anew():
    model, ids, outs = build(), tokens(1, 24), []
    for name in SHARED:
        fresh, used = make(name, model, 0.4), make(name, model, 0.4)
        feed(model, ids[:, :3], used, [3])
        used.crop(-3)
        outs.append([feed(model, ids, x, [1] * 24) for x in (fresh, used)])
    assert all(torch.equal(*pair) for pair in outs)


def test_buffers_that_never_move_keep_the_budget_they_began_with():
    model = build()
    cache = lcpatch.H2OCache(model, 0.5, compiled=True)
    with pytest.warns(UserWarning, match="give an integer budget, or a prompt"):
        feed(model, tokens(1, 30), cache, [1] * 30)
    assert budgets(cache) == [cache.layers[0].budget.least]


@every_cache
def test_assisted_decoding_is_no_prompt_and_the_next_turn_is_one(name):
    """transformers leaves recording on, so that tells nobody whether a step of several tokens guesses."""
    model = build()
    cache = make(name, model, 0.5)
    assisted = {"assistant_model": build(seed=3), "max_new_tokens": 20, "do_sample": False}
    out = model.generate(tokens(1, 40), past_key_values=cache, **assisted)
    prompted = budgets(cache)
    if name not in ("retrieval", "tiered"):  # which count any step of several tokens
        assert prompted == [20]
    turn = torch.cat([out, tokens(1, 60, seed=2)], 1)
    model.generate(turn, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert budgets(cache) == [60]
