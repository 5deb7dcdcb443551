"""What ranks agree on without talking: layouts, shards of a batch, plans, bytes, the choice of a strategy."""

from __future__ import annotations

import weakref
from itertools import accumulate, pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import assert_sees_causally
from parallel_cases import batch_of
from transformers import DataCollatorWithFlattening

import lcpatch
from lcpatch.bench import parallel as bench
from lcpatch.bench.attention_cases import Shape
from lcpatch.cli import main
from lcpatch.core.errors import BenchmarkError, ParallelError, UnknownNameError
from lcpatch.patterns import LayerShape
from lcpatch.training.parallel.batch import IGNORE, documents_of, shard_batch, shifted
from lcpatch.training.parallel.cost import Rates, choose, quickest_layout
from lcpatch.training.parallel.halo import Part, _part
from lcpatch.training.parallel.layout import make_layout
from lcpatch.training.parallel.lightseq import LightSeq, idle_fraction
from lcpatch.training.parallel.shorter import Shorter
from lcpatch.training.parallel.strategy import Work, strategies
from lcpatch.training.parallel.ulysses import _indices
from lcpatch_kernels import DENSE, BlockSparseSpec, Rule
from lcpatch_kernels.block_sparse.spec import _num_pairs

SHARD = "lcpatch_shard"


@st.composite
def cuts(draw):
    """(layout, documents of its one row)."""
    length, ranks = draw(st.integers(1, 90)), draw(st.integers(1, 7))
    edges = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
    documents = tuple(
        (a, b) for a, b in zip([0, *edges], [*edges, length], strict=True) if a < b and draw(st.booleans())
    )
    return make_layout(
        draw(st.sampled_from(["contiguous", "head_tail", "per_document"])), length, ranks, (documents,)
    ), documents


@settings(max_examples=150)
@given(cuts())
def test_layouts_deal_out_every_token_once(cut):
    layout, documents = cut
    dealt = torch.cat([layout.tokens(r) for r in range(layout.num_ranks)])
    assert dealt.sort().values.equal(torch.arange(layout.length))
    for r in range(layout.num_ranks):
        owner, local = layout.locate(layout.tokens(r))
        assert (owner == r).all()
        assert local.equal(torch.arange(layout.num_tokens(r)))
        assert sum(p.end - p.start for p in layout.pieces(r, documents)) <= layout.num_tokens(r)
    if layout.name == "contiguous":
        sizes = [layout.num_tokens(r) for r in range(layout.num_ranks)]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100)
@given(cuts())
def test_rectangles_are_causal_attention(cut):
    """Every pair of tokens that causal attention within documents allows, in exactly one call, and no other."""
    assert_sees_causally(*cut)


@pytest.mark.parametrize("ranks", range(1, 18))
def test_lightseq_computes_every_pair_once_and_idles_as_its_formula_says(ranks: int):
    steps = LightSeq().schedule(ranks)
    pairs = [(p.q, p.kv) for step in steps for p in step]
    assert sorted(pairs) == [(i, j) for i in range(ranks) for j in range(i + 1)]
    assert all(len({p.at for p in step}) == len(step) for step in steps)
    assert idle_fraction(ranks) == (0 if ranks % 2 else 1 / (2 * ranks))


# Batches


@pytest.mark.parametrize("layout", ["contiguous", "head_tail"])
@pytest.mark.parametrize("kind", ["packed", "flattened", "left", "right", "whole"])
def test_shards_hold_every_token_and_every_target_once(kind: str, layout: str):
    batch, docs = batch_of(kind)
    shards = [shard_batch(batch, r, 3, layout) for r in range(3)]
    places = [s[SHARD].layout.tokens(r) for r, s in enumerate(shards)]
    joined = {k: torch.cat([s[k] for s in shards], 1) for k in ("input_ids", "position_ids", "shift_labels")}
    order = torch.cat(places).argsort()
    ids, positions, targets = (joined[k][:, order] for k in ("input_ids", "position_ids", "shift_labels"))
    assert ids.equal(batch["input_ids"])
    found = [(b, *d) for b, row in enumerate(documents_of(batch)) for d in row]
    assert len(found) == len(docs)
    for (b, start, end), doc in zip(found, docs, strict=True):
        assert ids[b, start:end].equal(doc)
        assert positions[b, start:end].equal(torch.arange(len(doc)))
        assert targets[b, start : end - 1].equal(doc[1:])
        assert targets[b, end - 1] == IGNORE
    assert int((targets != IGNORE).sum()) == sum(len(d) - 1 for d in docs)
    assert {s["num_items_in_batch"] for s in shards} == {sum(len(d) - 1 for d in docs)}


def test_what_transformers_own_collator_packs():
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11]}]
    for flash in (False, True):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(features)
        assert documents_of(batch) == (((0, 3), (3, 7)),)
        # It masks each document's first label itself; shifting must not lose another.
        assert shifted(batch["labels"], documents_of(batch)).tolist() == [[6, 7, IGNORE, 9, 10, 11, IGNORE]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "row 0 of attention_mask has padding between real tokens"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"must be \[rows, tokens\], 1 for tokens"),
        ({"token_type_ids": torch.ones(1, 4)}, "token_type_ids cannot be cut over ranks; known tensors: input_ids"),
        ({"input_ids": torch.ones(1, 1)}, "rows of 1 tokens leave some of 2 ranks without any"),
        ({"input_ids": torch.ones(0, 4)}, "at least one of each"),
    ],
)
def test_batches_that_cannot_be_cut(change, message):
    with pytest.raises(ParallelError, match=message):
        shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long), **change}, 0, 2)


def test_layouts_that_do_not_exist():
    with pytest.raises(ValueError, match=r"layout='zigzag' is not one of 'contiguous', 'head_tail', 'per_document'"):
        make_layout("zigzag", 10, 2, (((0, 10),),))
    with pytest.raises(ValueError, match="packed or padded differently"):
        make_layout("per_document", 10, 2, (((0, 10),), ((0, 5),)))
    with pytest.raises(UnknownNameError, match=r"unknown parallel strategy 'hallo'\. Did you mean 'halo'"):
        strategies.get("hallo")


# halo


@settings(max_examples=150)
@given(
    st.integers(0, 40),
    st.integers(0, 4),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 60),
    st.integers(0, 150),
    st.integers(1, 60),
    st.integers(0, 90),
)
def test_the_shorter_sequence_shows_each_row_what_it_saw(sinks, stride, group, shifted_, back, first, rows, rest):
    """For every residue at once: in the shorter sequence a row sees the slots of the keys that it saw, and no other."""
    residues = range(max(stride, 1))
    rules = [Rule(sinks, stride, residue, group, shifted_, back) for residue in residues]
    last, length = first + rows, first + rows + rest
    shorter = Shorter.of(rules, 16, first, last, length)
    assert shorter.length <= last
    for rule, new, (keys, slots) in zip(rules, shorter.rules, shorter.keys, strict=True):
        held = dict(zip(slots.tolist(), keys.tolist(), strict=True))
        assert len(held) == len(keys)
        for i in range(first, last):
            row = i - last + shorter.length
            saw = [j for j in range(i + 1) if sees_key(rule, i, j, length)]
            sees_now = [s for s in range(row + 1) if sees_key(new, row, s, shorter.length)]
            assert sorted(held.get(s, -1) for s in sees_now) == saw


def sees_key(rule: Rule, i: int, j: int, length: int) -> bool:
    striped = rule.stride and j // 16 % rule.stride == rule.residue
    return j <= i and bool(j >= rule.lo(i, length) or j < rule.sinks or striped)


@pytest.mark.parametrize(
    ("pattern", "bound"),
    [
        (lcpatch.Shift(group_size=600), 2 * 600),
        (lcpatch.SF(group_size=600), 3 * 600),
        (lcpatch.Sink(4, 256), 256 + 4),
        (lcpatch.S2(64, 4, 16, sink_blocks=1), 4 * 64 + 64),
    ],
    ids=["shift", "sf", "sink", "s2"],
)
def test_what_a_rank_holds_does_not_grow_with_the_row(pattern, bound):
    """At 8 and 32 times a shard's length: its own keys and the pattern's own size; of `s2` the stripe's share more."""
    shard = 1024
    spec = pattern.spec(LayerShape(4, 2))
    for ranks in (8, 32):
        length = ranks * shard
        layout = make_layout("contiguous", length, ranks, (((0, length),),))
        far = length // pattern.stride + 64 if isinstance(pattern, lcpatch.S2) else 0
        for number in (0, 1):  # one KV head each
            part = _part(spec, 2, number, layout, (((0, length),),), ranks - 1, "cpu")
            assert max(c.index.shape[2] for c in part.calls) <= shard + bound + far
            assert 0 < sum(part.receives) < bound + far


def packed_rows(count: int, length: int):
    """Documents of rows that are packed differently every time."""
    for n in range(count):
        yield (((0, 40 + n), (40 + n, length)),)


def test_what_batches_that_are_gone_needed_is_forgotten():
    """Indices lie on the device, and every packed batch needs others."""
    spec, kept = work_of(lcpatch.SF(group_size=64), 4, 2, 256, 2).spec, {"ulysses": [], "halo": []}
    for documents in packed_rows(100, 256):
        layout = make_layout("per_document", 256, 2, documents)
        for _ in range(3):  # layers
            parts: list[Part] = [_part(spec, 2, n, layout, documents, 1, "cpu") for n in (0, 1)]
            send, *_ = _indices(layout, 1, 1, 4, 2, "cpu")
            kept["halo"].append(weakref.ref(parts[0].send))
            kept["ulysses"].append(weakref.ref(send))
    del parts, send
    alive = {name: len({id(x) for ref in found if (x := ref()) is not None}) for name, found in kept.items()}
    assert 1 <= alive["ulysses"] <= 4
    assert 1 <= alive["halo"] <= 32


# Bytes and choices


@pytest.mark.parametrize("ranks", [2, 3])
def test_counted_bytes_are_those_of_the_formulas(ranks: int):
    """The tests on real ranks compare what is counted with what is sent."""
    result = bench.run((ranks * 16384,), ranks, Shape(1, 6, 6, 64), say=lambda _: None)
    assert {row["formula"] for row in result["rows"]} == {"equal"}


def test_shifted_groups_send_sixty_times_less_than_a_ring():
    rows = bench.run((131072,), 8, Shape(), say=lambda _: None)["rows"]
    assert {row["formula"] for row in rows} == {"equal"}
    fewer = {row["layer"]: row["fewer_than_ring"] for row in rows if row["strategy"] == "halo"}
    assert min(fewer["shift, G = 8K"], fewer["sf, G = 8K"], fewer["sf, G = 8K, none returned"]) >= 60


def test_a_count_that_misses_its_formula_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "formula", lambda *_: bench.Volume((1,), (1,)))
    with pytest.raises(BenchmarkError, match="but the formula says"):
        bench.run((8192,), 2, Shape(), say=lambda _: None)


def work_of(pattern, heads: int, kv_heads: int, length: int, ranks: int, layout: str = "contiguous") -> Work:
    documents = (((0, length),),)
    shape = LayerShape(heads, kv_heads)
    spec = BlockSparseSpec.of([DENSE] * heads) if pattern is None else pattern.spec(shape)
    return Work(spec, kv_heads, 128, make_layout(layout, length, ranks, documents), documents)


def test_a_pattern_travels_by_halo():
    choice = choose(work_of(lcpatch.Shift(group_size=8192), 32, 8, 131072, 8))
    assert choice.name == "halo"
    assert "MiB sent" in choice.why
    assert {e.name: e.problem for e in choice.estimates}[
        "ring"
    ] == "it is for dense layers; 'halo' sends a pattern's keys only"


def test_contiguous_dense_layers_are_balanced_by_lightseq():
    """Where heads cannot be shared; on slow links halo, which sends the least but leaves its last rank most to do."""
    work = work_of(None, 12, 3, 16384, 8)
    assert choose(work, Rates(bandwidth=1e13)).name == "lightseq"
    assert choose(work, Rates(bandwidth=1e6)).name == "halo"


@pytest.mark.parametrize("bandwidth", [1e8, 1e10, 1e12])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (6, 2), (5, 5)])
def test_tokenring_is_chosen_only_where_it_sends_less(heads: int, kv_heads: int, bandwidth: float):
    choice = choose(work_of(None, heads, kv_heads, 8192, 4, "head_tail"), Rates(bandwidth))
    sent = {e.name: e.sent for e in choice.estimates if e.problem is None}
    assert choice.name != "tokenring" or sent["tokenring"] < sent["ring"]


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (lcpatch.S2(64, 16, 16), "head_tail"),
        (lcpatch.S2(64, 16, None), "contiguous"),  # without a stripe late rows see no more than early ones
        (lcpatch.Shift(group_size=8192), "contiguous"),
        (lcpatch.Sink(num_sinks=4, window=1024), "contiguous"),
    ],
)
def test_rows_that_see_more_the_later_they_are_lie_head_and_tail(pattern, layout: str):
    work = work_of(pattern, 32, 8, 131072, 4)
    layers = [(work.spec, 8, 128)] * 2
    row = (131072, 4, work.documents, 2)
    assert quickest_layout(layers, *row, Rates()) == layout
    times = {
        name: choose(work_of(pattern, 32, 8, 131072, 4, name)).estimates[0] for name in ("contiguous", "head_tail")
    }
    assert {e.name for e in times.values()} == {"halo"}
    assert min(times, key=lambda name: times[name].seconds) == layout
    # Where few bytes pass in a second, those that early and late rows send twice decide.
    assert quickest_layout(layers, *row, Rates(bandwidth=1e8)) == "contiguous"


def test_dense_layers_beside_a_pattern_have_a_say_in_the_layout():
    """Groups would stay contiguous, but in that layout the dense layers share their work badly, or send more."""
    groups, dense = (work_of(p, 30, 6, 131072, 4).spec for p in (lcpatch.Shift(group_size=8192), None))
    row = (131072, 4, (((0, 131072),),), 2)
    assert quickest_layout([(groups, 6, 128)], *row, Rates()) == "contiguous"
    assert quickest_layout([(groups, 6, 128), (dense, 6, 128)], *row, Rates()) == "head_tail"


def test_a_packed_row_is_counted_once_for_both_layouts_and_all_layers():
    """Counted anew for each estimate, 139 documents under the residues of a stripe took half a second a batch."""
    edges = list(accumulate(range(20, 160), initial=0))
    documents, length = (tuple(pairwise(edges)),), edges[-1]
    specs = [lcpatch.S2(16, 2, 16).spec(LayerShape(8, 8, rank, 4)) for rank in range(4)]
    _num_pairs.cache_clear()
    layout = quickest_layout([(spec, 8, 64) for spec in specs], length, 2, documents, 2, Rates())
    cut = make_layout(layout, length, 2, documents)
    for spec in specs:
        choose(Work(spec, 8, 64, cut, documents))
    counted = _num_pairs.cache_info()
    assert counted.misses == counted.currsize > 1024


def test_what_no_strategy_can_serve():
    with pytest.raises(
        ValueError, match=r"no strategy fits: halo: rolled groups .*ulysses: 3 ranks cannot share 4 query"
    ):
        choose(work_of(lcpatch.Shift(group_size=64, wrap=True), 4, 2, 300, 3))


def test_the_plan_says_how_ranks_would_share_a_row(tmp_path, capsys):
    transformers.LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--length", "16384", "--attention", "full,sf", "--ranks"]
    assert main([*words, "4"]) == 0
    said = capsys.readouterr().out
    assert "One layer's attention over 4 GPUs of 50 GB/s" in said
    assert "\nsf: halo, " in said
    assert "MiB sent" in said
    assert main([*words, "0"]) == 2
    assert main([*words, "4", "--bandwidth", "-1"]) == 2
    told = capsys.readouterr()
    assert "--ranks 0 must be 1 to 16384" in told.err
    assert "--bandwidth -1.0 above 0" in told.err
    assert not told.out  # before the table
