"""A cache that was filled under `torch.inference_mode`, whose tensors change only so, is asked and changed outside."""

import copy

import pytest
import torch
from cache_cases import ALL, COMPILED, feed, make, make_model
from models import tokens

CACHES = [*((name, {}) for name in ALL), *((name, {"compiled": True}) for name in COMPILED)]
ASKED = {
    "stats": lambda cache, folder: cache.stats(),
    "memory": lambda cache, folder: cache.memory(),
    "save": lambda cache, folder: cache.save(folder / "prefix"),
    "copy": lambda cache, folder: copy.deepcopy(cache),
    "crop": lambda cache, folder: cache.crop(-3),
    "rows": lambda cache, folder: cache.batch_select_indices(torch.tensor([1, 0])),
    "beams": lambda cache, folder: cache.reorder_cache(torch.tensor([1, 1])),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("name", "options"), CACHES)
def test_it_is_what_it_would_be_outside(name, options, asked, tmp_path):
    model, ids = make_model(name), tokens(2, 80)
    plain, inference = (make(name, model, small=True, **options) for _ in range(2))
    feed(model, ids[:, :60], plain, [50, *[1] * 10])
    with torch.inference_mode():
        feed(model, ids[:, :60], inference, [50, *[1] * 10])
    want, got = (ASKED[asked](cache, tmp_path) for cache in (plain, inference))
    if asked in ("stats", "memory"):
        assert got == want
    want = feed(model, ids[:, 60:], plain, [1] * 10 + [10])
    with torch.inference_mode():
        assert torch.equal(feed(model, ids[:, 60:], inference, [1] * 10 + [10]), want)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_generates_only_under_it_until_it_is_reset(name):
    model, ids = make_model(name), tokens(2, 60)
    cache = make(name, model, small=True, compiled=True)
    want = feed(model, ids, make(name, model, small=True, compiled=True), [50, *[1] * 10])
    with torch.inference_mode():
        feed(model, ids[:, :58], cache, [50, *[1] * 8])
    with pytest.raises(RuntimeError, match=r"fill it under torch\.no_grad\(\)"):
        feed(model, ids[:, 58:59], cache, [1])
    with torch.inference_mode():
        assert torch.equal(feed(model, ids[:, 58:], cache, [1, 1]), want[:, 58:])
    cache.reset()
    assert torch.equal(feed(model, ids, cache, [50, *[1] * 10]), want)
