"""Rows of a fixed length: what they hold and mask, and how conversations share them."""

from itertools import chain, pairwise

import eval_cases
import numpy as np
import pytest
import torch
from data_cases import CHATS, chatty, expected, store, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from noise import distance, model_budget

import lcpatch
from lcpatch.training import encode, rows


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_text(tmp_path, masked: bool):
    made = texts(tmp_path)
    documents, flat = expected(), list(chain(*expected()))
    length = 10
    found = rows.TextRows(made, length, masked)
    assert len(found) == len(flat) // length
    place = [n for ids in documents for n in range(len(ids))]
    for number, row in enumerate(found[n] for n in range(len(found))):
        span = slice(number * length, (number + 1) * length)
        assert row["input_ids"].tolist() == flat[span]
        if not masked:
            assert row.keys() == {"input_ids", "labels"}
            assert row["labels"].tolist() == [-100, *flat[span][1:]]
            continue
        positions = place[span]  # a document that goes on from the row before starts anew
        first = next((n for n, p in enumerate(positions) if p == 0), length)
        positions[:first] = range(first)
        assert row["position_ids"].tolist() == positions
        assert row["labels"].tolist() == [-100 if p == 0 else t for p, t in zip(positions, flat[span], strict=True)]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_packed_row_is_its_documents_one_by_one(tmp_path):
    """The loss of a row under every arm is that of its documents alone, weighted by their labels."""
    made = texts(tmp_path)
    row = rows.stack([rows.TextRows(made, len(made))[0]])
    model = build(vocab_size=eval_cases.VOCAB)
    allowed = model_budget(model, row["input_ids"])
    for method, options in [("sf", {}), ("s2", {"block_size": 16, "local_blocks": 1, "stride": 3, "sink_blocks": 0})]:
        lcpatch.apply(model, method, mode="train", **options)
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                packed = model(row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0]
                alone = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in expected()]
            assert distance(packed, torch.cat(alone)) <= allowed


def test_chats_are_packed_whole(tmp_path):
    made = store(tmp_path, CHATS, encode.chats(chatty(), 100))
    sizes = np.diff([0, *made.ends]).tolist()
    length = max(sizes[0] + sizes[2], sizes[1]) + 3
    found = rows.ChatRows(made, length, pad=7)
    row = found[0]
    assert [len(found[n]["input_ids"]) for n in range(len(found))] == [length] * len(found)
    assert row["input_ids"][sizes[0] :][: sizes[2]].tolist() == made.tokens(made.ends[1], made.ends[2]).tolist()
    empty = length - sizes[0] - sizes[2]
    assert row["input_ids"][-empty:].tolist() == [7] * empty
    assert (row["labels"][-empty:] == -100).all()
    assert row["position_ids"].tolist() == [*range(sizes[0]), *range(sizes[2]), *range(empty)]
    assert (row["labels"] != -100).sum() == made.learn(0, sizes[0]).sum() + made.learn(*made.ends[1:3]).sum()


def test_what_is_too_long_or_without_an_answer_is_left_out(tmp_path):
    empty = {"prompt": "x", "completion": ""}
    made = store(tmp_path, [*CHATS, {"prompt": "a" * 500, "completion": "b"}, empty], encode.chats(chatty(), 60))
    assert made.index["records"] == 5
    assert made.index["left_out"] == 1  # the empty completion still has its end-of-text token to learn
    with pytest.raises(ValueError, match=r"none of 1 records has an answer and at most 5 tokens"):
        rows.ChatRows(store(tmp_path, [{"prompt": "a" * 50, "completion": "b"}], encode.chats(chatty(), 5)), 5, 0)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=200))
def test_first_fit(sizes):
    """Every document in one row, no row too full, and no two neighbours that would fit into one."""
    packed = rows.first_fit(sizes, 40)
    assert sorted(chain(*packed)) == list(range(len(sizes)))
    fill = [sum(sizes[n] for n in row) for row in packed]
    assert all(0 < f <= 40 for f in fill)
    assert all(a + b > 40 for a, b in pairwise(fill))


def test_too_little_data(tmp_path):
    with pytest.raises(ValueError, match=r"the data has \d+ tokens, and a row 1000: give more data, or a shorter"):
        rows.TextRows(texts(tmp_path, ["One line."]), 1000)
    for length in (-1, 0, 1):
        with pytest.raises(ValueError, match=rf"length={length} must be at least 2 tokens"):
            rows.TextRows(texts(tmp_path), length)
    few = rows.TextRows(texts(tmp_path), 10)
    with pytest.raises(ValueError, match=rf"makes {len(few)} rows, and {len(few)} of them are to be evaluated on"):
        rows.split(few, len(few))
