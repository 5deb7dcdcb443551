"""Codecs: the error of a round trip is within its bound for every element, and a cache that uses one decodes by it."""

import pytest
import torch
from cache_cases import LENGTH, feed, left_padding, make_model
from models import tokens
from noise import distance

import lcpatch
from lcpatch.caches.codec import CODECS, GROUP, codec_named
from lcpatch.caches.slots import Slots

SHAPE = (2, 3, 50, 64)
EPS = torch.finfo(torch.float32).eps


def inputs(kind: str) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=rng) * 1.5
    if kind == "outliers":  # a few channels of a key are ten times the others
        x[..., ::17] *= 10
    elif kind == "offset":
        x += 40
    elif kind == "zeros":
        x[:, :, ::2] = 0
    elif kind == "tiny":
        x *= 1e-20
    elif kind == "steep":
        x *= torch.logspace(-6, 6, SHAPE[-1])
    return x


def bound(name: str, x: torch.Tensor) -> torch.Tensor:
    """The largest error that each element may have, by the codec's own docstring, and a few roundings in fp32."""
    if name == "bf16":
        return x.abs() * 2**-8
    if name == "int4":
        groups = x.unflatten(-1, (-1, GROUP))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        return ((high - low) / 30 + 4 * EPS * groups.abs().amax(-1, keepdim=True)).expand_as(groups).flatten(-2)
    largest = x.abs().amax(-1, keepdim=True)
    if name == "int8":
        return (largest / 254 * (1 + 127 * 4 * EPS)).expand_as(x)
    # e4m3: half a unit of 3 bits of a normal number, half the smallest subnormal, 2^-9, of a scaled one
    return torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10) * (1 + 8 * EPS)


@pytest.mark.parametrize("kind", ["normal", "outliers", "offset", "zeros", "tiny", "steep"])
@pytest.mark.parametrize("name", [n for n in CODECS if n])
def test_a_round_trip_stays_within_its_bound(name, kind):
    x = inputs(kind)
    codec = codec_named(name)
    got = codec.decode(codec.encode(x), x)
    assert got.dtype == x.dtype
    assert ((got - x).abs() <= bound(name, x)).all()
    assert torch.equal(got[x == 0], x[x == 0]) or name == "int4"


@pytest.mark.parametrize("name", [n for n in CODECS if n])
def test_half_of_the_bound_is_too_little(name):
    """Negative control: the bounds are not slack."""
    x = inputs("normal")
    codec = codec_named(name)
    assert ((codec.decode(codec.encode(x), x) - x).abs() > bound(name, x) / 2).any()


def test_bytes():
    """Per element: 2, 1, 1 and a half, and the scales."""
    x = inputs("normal").bfloat16()
    held = {name: Slots(codec_named(name).encode(x)).nbytes() / x.numel() for name in CODECS}
    assert held == {None: 2, "bf16": 2, "int8": 1 + 4 / 64, "fp8": 1 + 4 / 64, "int4": 0.5 + 8 / GROUP}


def test_int4_says_which_head_dims_it_takes():
    with pytest.raises(ValueError, match="this head dim is 15"):
        codec_named("int4").encode(torch.zeros(1, 1, 1, 15))


@pytest.mark.parametrize("name", [n for n in CODECS if n])
def test_a_cache_attends_to_what_its_codec_keeps(name):
    """As if the model's keys and values of earlier steps had gone through the codec; a batch is its rows."""
    model = make_model("h2o")
    ids, mask = tokens(2, LENGTH), left_padding([0, 31])
    cache = lcpatch.H2OCache(model, budget=24, codec=name)
    got = feed(model, ids, cache, [60, *[1] * 30], mask)
    alone = feed(model, ids[1:, 31:], lcpatch.H2OCache(model, budget=24, codec=name), [29, *[1] * 30])
    full = lcpatch.H2OCache(model, budget=24)
    plain = feed(model, ids, full, [60, *[1] * 30], mask)
    lost = distance(got[mask.bool()], plain[mask.bool()])
    assert lost > 0
    assert distance(got[1:, 31:], alone) < lost / 100  # only where rounding falls the other way
    assert cache.memory()["device"] < full.memory()["device"]


def test_fewer_bits_lose_more():
    model, ids = make_model("sink"), tokens(1, LENGTH)
    want = feed(model, ids, lcpatch.SinkCache(model, budget=4096), [60, *[1] * 30])
    lost = {
        name: distance(feed(model, ids, lcpatch.SinkCache(model, budget=4096, codec=name), [60, *[1] * 30]), want)
        for name in CODECS
    }
    assert lost[None] == 0
    assert 0 < lost["bf16"] < lost["int8"] < lost["fp8"] < lost["int4"]
