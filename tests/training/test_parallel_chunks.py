"""Chunks that ranks share, as far as one process can tell: which tokens, which pairs, what is refused."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import assert_sees_causally
from models import SHORT, build, tokens
from noise import FACTOR, distance
from parallel_cases import EXACT, make_model, single, worst
from parallel_chunk_cases import chunked_backward, labelled, over_ranks
from peft import LoraConfig, get_peft_model
from schedules import pad
from test_chunkwise_memory import DEEP, slope

import lcpatch
from lcpatch.core.errors import ParallelError
from lcpatch.training import chunkwise
from lcpatch.training.buffers import DeviceStore
from lcpatch.training.parallel import parallelize
from lcpatch.training.parallel.chunks import share
from lcpatch.training.parallel.layout import Layout, chunked
from lcpatch.training.text import Text, make_text


@st.composite
def chunk_cuts(draw) -> tuple[Layout, tuple[tuple[int, int], ...]]:
    """(layout of the last of some chunks, documents of the row up to its end)."""
    ranks = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(ranks, 17), min_size=1, max_size=5))
    edges = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    cuts = sorted(draw(st.lists(st.integers(0, edges[-1]), max_size=5)))
    spans = zip([0, *cuts], [*cuts, edges[-1]], strict=True)
    documents = tuple((a, b) for a, b in spans if a < b and draw(st.booleans()))
    return chunked(list(pairwise(edges)), ranks), documents


@settings(max_examples=100)
@given(chunk_cuts())
def test_a_chunks_queries_see_all_that_was_before_and_no_more(cut):
    """Every pair of the last chunk's tokens with the tokens before them in their document, in exactly one call."""
    layout, documents = cut
    assert_sees_causally(layout, documents)
    shares = [layout.num_tokens(r) for r in range(layout.num_ranks)]
    assert max(shares) - min(shares) <= len(layout.runs[0])


def text_of(kind: str, size: int) -> Text:
    batch, _ = labelled(kind)
    given = [batch.get(name) for name in ("input_ids", "labels", "attention_mask", "position_ids")]
    return make_text(*given, None, size, True)


@pytest.mark.parametrize("size", [3, 20, 73, 400])
@pytest.mark.parametrize("kind", ["whole", "packed", "left", "right"])
def test_every_token_is_shared_once(kind: str, size: int):
    whole = text_of(kind, size)
    parts = [share(whole, SimpleNamespace(rank=r, size=3), size) for r in range(3)]
    places = [list(part.shards.values())[-1].layout.tokens(r) for r, part in enumerate(parts)]
    order = torch.cat(places).argsort()
    for name in ("ids", "targets"):
        assert torch.cat([getattr(part, name) for part in parts], 1)[:, order].equal(getattr(whole, name))
    positions = torch.arange(whole.ids.shape[1])[None] if whole.positions is None else whole.positions
    assert torch.cat([part.positions for part in parts], 1)[:, order].equal(positions)
    for chunks in zip(*(part.chunks(size) for part in parts), strict=True):
        assert min(end - start for start, end in chunks) >= 1
        assert sum(end - start for start, end in chunks) < size + 3
    assert {float(part.denominator) for part in parts} == {float((whole.targets != -100).sum())}
    real = {tuple(shard.documents) for part in parts for shard in list(part.shards.values())[-1:]}
    assert len(real) == 1
    inside = torch.zeros_like(whole.ids, dtype=torch.bool)
    for b, row in enumerate(real.pop()):
        for start, end in row:
            inside[b, start:end] = True
    assert inside.equal(torch.ones_like(inside) if whole.mask is None else whole.mask.bool())


@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        (3, 20, "chunk_size=3 leaves some of 4 ranks without any token; use fewer ranks"),
        (8, 3, "a text of 3 tokens leaves some of 4 ranks without any token"),
    ],
)
def test_fewer_tokens_than_ranks(size: int, length: int, message: str):
    ids = tokens(1, length + 1)
    text = make_text(ids, ids, None, None, None, size, True)
    with pytest.raises(ParallelError, match=message):
        share(text, SimpleNamespace(rank=0, size=4), size)


def test_padding_between_tokens():
    ids, mask = pad([tokens(1, 20)[0], tokens(1, 9)[0]], "right")
    mask[0, 4] = 0
    text = make_text(ids, ids, mask, None, None, 8, True)
    with pytest.raises(ParallelError, match="row 0 of attention_mask has padding between real tokens"):
        share(text, SimpleNamespace(rank=0, size=2), 8)


# A group of one rank: everything but other ranks


@pytest.mark.parametrize("kind", ["packed", "left"])
def test_one_rank_is_one_process(group, kind: str):
    batch, docs = labelled(kind)
    model = make_model("llama", {"method": "sf", **SHORT["sf"]}, torch.float64, lora=True, checkpoint=True)
    want = single(model, docs)
    assert worst(over_ranks(model, batch, 20, "auto")[0], want) <= EXACT
    assert worst(chunked_backward(model, batch, 20), want) <= EXACT  # and afterwards it is one's own again


def test_dropout_is_the_same_in_both_passes(group):
    """One rank draws what one process draws, and draws it again."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.3)
    model = get_peft_model(build(), settings).double().train()
    batch, _ = labelled("whole")
    torch.manual_seed(5)
    want = chunked_backward(model, batch, 16)
    torch.manual_seed(5)
    assert worst(over_ranks(model, batch, 16, "tokenring")[0], want) <= EXACT
    assert worst(chunked_backward(model, batch, 16), want) > 1e-3  # by other random numbers


def test_under_autocast_keys_are_kept_as_they_are_attended_to(group, monkeypatch):
    """Two kappa a token in bf16, though rotary embeddings leave keys in fp32."""
    model, batch = build("mistral").train(), labelled("whole")[0]
    exact, held = chunked_backward(model, batch, 16), []
    with torch.autocast("cpu", torch.bfloat16):
        allowed = FACTOR * worst(chunked_backward(model, batch, 16), exact)
        monkeypatch.setattr(DeviceStore, "close", lambda store: held.append(store.memory()["device"]))
        got = over_ranks(model, batch, 16, "tokenring")[0]
    assert 0 < worst(got, exact) <= allowed
    kappa = 2 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, head dim, bytes
    assert held == [2 * kappa * 2 * 42]


def test_what_chunks_inside_a_rank_refuse(group):
    model, ids = build().train(), tokens()
    batch = {"input_ids": ids, "labels": ids, "chunk_size": 16}
    for name in ("lightseq", "ulysses", "halo"):
        with parallelize(model, strategy=name), pytest.raises(ParallelError, match=f"layer 0 cannot run .*{name}"):
            chunkwise.backward(model, **batch)
    with parallelize(model):
        with pytest.raises(ParallelError, match="offload=True is not for a model that ranks share"):
            chunkwise.backward(model, **batch, offload=True)
        with pytest.raises(ParallelError, match="attention='cudnn' is not for a model that ranks share"):
            chunkwise.backward(model, **batch, attention="cudnn")
    before = model(ids).logits
    chunkwise.backward(model, **batch)
    assert distance(model(ids).logits, before) == 0


def test_a_pattern_that_follows_the_length_is_refused(group):
    model = lcpatch.apply(build(), "shift").train()
    ids = tokens()
    with parallelize(model), pytest.raises(ValueError, match="give a fixed group_size"):
        chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=16)


@pytest.mark.slow
def test_nothing_else_grows_inside_a_rank(group):
    """No layer's graph keeps what was before the chunk: of DEEP's eight, that would be a kappa more for each copy.

    Two kappa are the buffers; what is freed when differs by a tenth from run to run.
    """
    model = build("mistral", **DEEP).train()

    def run(length: int) -> None:
        chunked_backward(model, {"input_ids": tokens(1, length), "labels": tokens(1, length)}, 32)

    with parallelize(model, strategy="tokenring"):
        assert 1.75 < slope(run) < 3
    lcpatch.apply(model, "sf", **SHORT["sf"])
    with parallelize(model, strategy="halo"):
        assert 1.75 < slope(run) < 2.5  # what a pattern's rows see does not grow, so neither does what they are brought
