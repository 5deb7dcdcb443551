"""Each method's definition, written once more from its paper as plain loops, against the rules it compiles to."""

import math
from collections.abc import Callable

import pytest
import torch
from test_every_pattern import mask_of

from lcpatch import S2, SF, Shift, Sink
from lcpatch.patterns import LayerShape

Sees = Callable[[int, int, int], bool]
"""(head, row, key) -> whether the row sees the key, causality aside."""


def assert_mask(pattern, shape: LayerShape, length: int, sees: Sees) -> None:
    mask = mask_of(pattern.spec(shape), length)
    for h in range(shape.num_heads):
        for i in range(length):
            got = mask[h, i].nonzero().flatten().tolist()
            assert got == [j for j in range(length) if j <= i and sees(h, i, j)], (h, i)


# S2: arXiv 2407.17678, and our choice of residues


def s2_sees(block: int, local: int, stride: int | None, sinks: int, residue: Callable[[int], int | None]) -> Sees:
    """`residue(h)` of head h; None for a dense head."""

    def sees(h: int, m: int, n: int) -> bool:
        i, j, c = m // block, n // block, residue(h)
        return c is None or i - j < local or (stride is not None and j % stride == c) or j < sinks

    return sees


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize(("local", "stride", "sinks"), [(1, 3, 0), (2, 4, 1), (1, 1, 0), (2, None, 1), (1, 7, 2)])
def test_s2(rank: int, heads: int, kv_heads: int, local: int, stride: int | None, sinks: int):
    """All heads of a KV group share a residue; the s-th sparse layer with P KV heads goes on at s * P."""
    pattern = S2(16, local, stride, sinks)

    def residue(h: int) -> int:
        g = h // (heads // kv_heads)
        return (-(g + rank * kv_heads)) % (stride or 1)

    assert_mask(pattern, LayerShape(heads, kv_heads, rank, 5), 131, s2_sees(16, local, stride, sinks, residue))


def test_s2_per_query_head_fixed_offset_and_step():
    pattern = S2(16, 1, 5, 0, share="query_head", head_step=2, layer_offset=3)
    sees = s2_sees(16, 1, 5, 0, lambda h: (-(2 * h + 3)) % 5)
    assert_mask(pattern, LayerShape(6, 2, 3, 4), 131, sees)


def test_s2_one_pattern_for_all_heads():
    pattern = S2(16, 1, 5, 0, share="layer")
    assert_mask(pattern, LayerShape(6, 2, 3, 4), 131, s2_sees(16, 1, 5, 0, lambda h: (-3) % 5))


def test_s2_dense_heads_are_the_last_kv_heads():
    """The rotation counts the sparse ones only."""
    pattern = S2(16, 1, 5, 0, num_dense_heads=1)
    sees = s2_sees(16, 1, 5, 0, lambda h: None if h >= 6 else (-(h // 3 + 2 * 2)) % 5)
    assert_mask(pattern, LayerShape(9, 3, 2, 4), 131, sees)
    with pytest.raises(ValueError, match="num_dense_heads=4, but the layer has 3 kv_heads"):
        S2(16, num_dense_heads=4).rules(LayerShape(9, 3))


def test_phi3_small_preset():
    """Block 64, 16 local blocks, stride 8, offset 1, a pattern per query head, no sinks, the same in every layer."""
    pattern = S2.phi3_small()
    sees = s2_sees(64, 16, 8, 0, lambda h: (-(h + 1)) % 8)
    length = 64 * 19
    rows = [0, 1023, 1024, 1087, length - 1]
    for rank in (0, 7):
        mask = mask_of(pattern.spec(LayerShape(32, 8, rank, 16)), length, rows)
        for h in range(32):
            for r, m in enumerate(rows):
                got = mask[h, r].nonzero().flatten().tolist()
                assert got == [n for n in range(m + 1) if sees(h, m, n)], (h, m)
        assert [h for h in range(32) if mask[h, -1, 0]] == [
            7,
            15,
            23,
            31,
        ]  # block 0 is a far block of 4 of its 32 heads


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("stride", [4, 16])
def test_s2_layers_together_cover_every_block(kv_heads: int, stride: int):
    """Any ceil(V / P) consecutive sparse layers reach every residue, and then there is nothing to warn of."""
    pattern = S2(16, 1, stride, 0)
    needed = math.ceil(stride / kv_heads)
    for first in range(3):
        layers = [LayerShape(2 * kv_heads, kv_heads, rank, needed) for rank in range(first, first + needed)]
        assert {rule.residue for layer in layers for rule in pattern.rules(layer)} == set(range(stride))
    assert pattern.warnings(LayerShape(2 * kv_heads, kv_heads, 0, needed)) == []
    if needed > 1:
        (warning,) = pattern.warnings(LayerShape(2 * kv_heads, kv_heads, 0, needed - 1))
        missing = stride - (needed - 1) * kv_heads
        assert f"{missing} of {stride} far blocks are seen by no head" in warning
        assert f"at most {(needed - 1) * kv_heads}," in warning


@pytest.mark.parametrize(("local", "stride", "length"), [(16, 8, 8192), (16, 16, 8192), (8, 16, 8192), (1, 15, 8192)])
def test_s2_density_of_the_literature(local: int, stride: int, length: int):
    """Blocks visited, counted here; the spec counts tokens, of which the diagonal blocks have half."""
    n, block = length // 64, 64
    visited = 0
    for c in range(stride):
        visited += sum(1 for i in range(n) for j in range(i + 1) if i - j < local or j % stride == c)
    pairs = visited * block * block - stride * n * (
        block * (block - 1) // 2
    )  # minus the upper half of the diagonal blocks
    got = S2(64, local, stride, 0).spec(LayerShape(stride, stride)).density(length)
    assert got == pytest.approx(pairs / (stride * length * (length + 1) // 2))


# LongLoRA's shift: arXiv 2309.12307


@pytest.mark.parametrize("heads", [9, 4])
@pytest.mark.parametrize("group", [22, 21])
@pytest.mark.parametrize("length", [75, 88, 10])
def test_shift(heads: int, group: int, length: int):
    """Groups at 0, G, 2G, …; in the other half of the heads at 0, d, d + G, … with d = G // 2."""
    d = group // 2

    def sees(h: int, i: int, j: int) -> bool:
        starts = range(0, length, group) if h < heads - heads // 2 else [0, *range(d, length, group)]
        return max(s for s in starts if s <= i) <= j

    assert_mask(Shift(group_size=group), LayerShape(heads, 1), length, sees)


@pytest.mark.parametrize("length", [75, 88, 7, 4, 3, 1])
def test_shift_ratio(length: int):
    """A quarter of the length, rounded up."""
    group = math.ceil(length / 4)
    shape = LayerShape(4, 2)
    fixed = (
        mask_of(Shift(group_size=group).spec(shape), length)
        if group > 1
        else torch.eye(length).bool().expand(4, -1, -1)
    )
    assert torch.equal(mask_of(Shift().spec(shape), length), fixed)


@pytest.mark.parametrize("length", [64, 80])
def test_shift_rolled_is_the_papers_pseudo_code(length: int):
    """Roll half of the heads by -G/2, attend within groups causally, roll back: position r(i) = (i - d) mod S."""
    group, d = length // 4, length // 4 // 2
    mask = mask_of(Shift(wrap=True).spec(LayerShape(2, 1)), length)
    block = torch.block_diag(*[torch.ones(group, group).tril()] * 4).bool()
    assert torch.equal(mask[0], block)
    # qkv.roll(-d): the tensor at place p holds token (p + d) mod S, so token t stands at place (t - d) mod S
    place = (torch.arange(length) - d) % length
    assert torch.equal(mask[1], block[place][:, place])
    assert mask[1].triu(1).any()  # it leaks, as said
    assert not Shift(wrap=True).causal


# SinkLoRA's SF-Attn: arXiv 2406.05678, section 3, made causal


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fraction", "num_shifted"),
    [(9, 3, 0.5, 2), (8, 2, 0.5, 2), (4, 4, 0.5, 1), (9, 3, 0.0, 4), (9, 3, 1.0, 0), (16, 4, 0.25, 6)],
)
@pytest.mark.parametrize("num_sinks", [0, 3])
def test_sf(heads: int, kv_heads: int, fraction: float, num_shifted: int, num_sinks: int):
    """Of 9 heads 5 are unshifted and 4 shifted, of which 2 return; by query head, whatever the KV heads are."""
    group, length = 22, 75

    def sees(h: int, i: int, j: int) -> bool:
        d = group // 2 if h >= heads - num_shifted else 0
        gid = [(t + group - d) // group if d else t // group for t in (i, j)]
        return gid[0] == gid[1] or j < num_sinks

    pattern = SF(group_size=group, returned_fraction=fraction, num_sinks=num_sinks)
    assert_mask(pattern, LayerShape(heads, kv_heads), length, sees)


def test_sf_without_sinks_and_returns_is_shift():
    shape = LayerShape(9, 3)
    sf = SF(group_size=22, returned_fraction=0.0, num_sinks=0)
    assert sf.spec(shape) == Shift(group_size=22).spec(shape)


# Attention sinks: arXiv 2309.17453


@pytest.mark.parametrize(("num_sinks", "window"), [(4, 9), (0, 1), (3, 1), (80, 2), (2, 200)])
def test_sink(num_sinks: int, window: int):
    sees = lambda h, i, j: i - j < window or j < num_sinks  # noqa: E731
    assert_mask(Sink(num_sinks, window), LayerShape(4, 2), 75, sees)


# Wrong options


@pytest.mark.parametrize(
    ("build", "value", "rule"),
    [
        (lambda: S2(stride=0), "stride=0", "a whole number >= 1 (1 is dense), or None"),
        (lambda: S2(stride=2.0), "stride=2.0", "a whole number >= 1"),
        (lambda: S2(block_size=48), "block_size=48", "a power of two >= 16: 16, 32, 64"),
        (lambda: S2(block_size=8), "block_size=8", "a power of two >= 16"),
        (lambda: S2(block_size=True), "block_size=True", "a power of two >= 16"),
        (lambda: S2(local_blocks=0), "local_blocks=0", "a whole number >= 1"),
        (lambda: S2(sink_blocks=-1), "sink_blocks=-1", "a whole number >= 0"),
        (lambda: S2(num_dense_heads=-1), "num_dense_heads=-1", "a whole number >= 0"),
        (lambda: S2(head_step="1"), "head_step='1'", "a whole number >= 0"),
        (lambda: S2(share="head"), "share='head'", "'kv_head', 'query_head' or 'layer'"),
        (lambda: S2(layer_offset="turn"), "layer_offset='turn'", "'rotate' or a whole number"),
        (lambda: S2(share="layer", num_dense_heads=1), "num_dense_heads=1", "one pattern for all heads"),
        (lambda: Shift(group_size=1), "group_size=1", "a whole number >= 2"),
        (lambda: Shift(group_size=8.0), "group_size=8.0", "a whole number >= 2"),
        (lambda: Shift(group_size=8, group_ratio=0.5), "group_ratio=0.5", "not both"),
        (lambda: Shift(group_ratio=0), "group_ratio=0", "in (0, 1], such as 1/4"),
        (lambda: Shift(group_ratio=1.5), "group_ratio=1.5", "in (0, 1]"),
        (lambda: Shift(group_ratio=float("nan")), "group_ratio=nan", "in (0, 1]"),
        (lambda: Shift(group_ratio="1/4"), "group_ratio='1/4'", "in (0, 1]"),
        (lambda: Shift(group_ratio=1e-9), "group_ratio=1e-09", "in (0, 1]"),
        (lambda: Shift(group_size=8, wrap="no"), "wrap='no'", "True or False"),
        (lambda: SF(returned_fraction=1.5), "returned_fraction=1.5", "in [0, 1]"),
        (lambda: SF(returned_fraction="half"), "returned_fraction='half'", "in [0, 1]"),
        (lambda: SF(num_sinks=-1), "num_sinks=-1", "a whole number >= 0"),
        (lambda: Sink(num_sinks=-4), "num_sinks=-4", "a whole number >= 0"),
        (lambda: Sink(window=0), "window=0", "a whole number >= 1"),
        (lambda: Sink(window="1024"), "window='1024'", "a whole number >= 1"),
    ],
)
def test_wrong_options(build: Callable, value: str, rule: str):
    with pytest.raises(ValueError, match=r"must be|not both|one pattern") as error:
        build()
    assert value in str(error.value)
    assert rule in str(error.value)
