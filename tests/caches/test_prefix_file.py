"""The file of a saved cache: what is broken, changed or damaged is refused, and nobody ever sees half of one."""

import json
import os
import threading
import warnings
from random import Random

import pytest
import torch
from cache_cases import ALL, feed, make, make_model
from models import tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from store_cases import CODEC, DENSE, LOSSY, PADS, continued, header_of, rewritten, saved

import lcpatch
from lcpatch.caches import prefix_file

# Broken files.


def test_files_that_are_no_caches(tmp_path):
    model = make_model("h2o")
    path, *_ = saved("h2o", tmp_path)
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    cases = {
        "cut": "cut off",
        "text": "not a safetensors",
        "empty": "not a safetensors",
        "other": "no cache of lcpatch",
    }
    for name, word in {**cases, "missing": "no such file"}.items():
        with pytest.raises(lcpatch.StoreError, match=word):
            lcpatch.load_cache(tmp_path / name, model)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: h | {"format": 3}, "format 3; this lcpatch reads up to 2"),
        (lambda h: h | {"format": True}, "not one that"),
        (lambda h: h | {"cache": "cluster9"}, "unknown cache"),
        (lambda h: h | {"options": {"budget": -3}}, "budget=-3"),
        (lambda h: h | {"options": {"path": "/etc/passwd"}}, "unexpected keyword"),
        (lambda h: h | {"options": {"budget": [1]}}, "budget="),
        (lambda h: h | {"layers": h["layers"][:1]}, "holds 1 layers"),
        (lambda h: "[" * 100000, "not valid JSON"),
        (lambda h: " " * (9 << 20) + "{}", "larger than"),
        (lambda h: [], "not one that"),
    ],
)
def test_a_changed_header_is_refused(change, word, tmp_path):
    path, _, model, _ = saved("h2o", tmp_path)
    with pytest.raises(ValueError, match=word):
        lcpatch.load_cache(rewritten(path, change), model)


def scalar(x):
    return x.flatten()[0]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in ALL), ("retrieval", LOSSY), ("retrieval", DENSE), ("tiered", CODEC)]
)
def test_fuzzed_numbers_and_tensors_never_load_into_nonsense(name, options, tmp_path):
    """Every number of a layer replaced by something wrong, every tensor by one that does not fit."""
    path, _, model, _ = saved(name, tmp_path, **options)
    numbers = header_of(path)["layers"][0]["numbers"]
    for key, value in numbers.items():
        for wrong in (None, -1, "5", 1 << 60, [], [1], {}, 2.5, [-1] * len(PADS), [None] * len(PADS)):

            def change(header, key=key, wrong=wrong):
                header["layers"][0]["numbers"][key] = wrong
                return header

            if wrong == value:
                continue
            with pytest.raises(lcpatch.StoreError, match="layer 0"):
                lcpatch.load_cache(rewritten(path, change), model)
    names = [n for n in load_file(path) if n.startswith("0.")]
    for target in names:
        for wrong in (
            lambda x: x[:1],
            lambda x: x[:, :1],
            lambda x: x[..., :-1],
            lambda x: x.double(),
            lambda x: x[0],
            scalar,
        ):

            def spoil(held, target=target, wrong=wrong):
                return held | {target: wrong(held[target]).clone().contiguous()}

            with pytest.raises(lcpatch.StoreError, match="layer 0"):
                lcpatch.load_cache(rewritten(path, tensors=spoil), model)

        def drop(held, target=target):
            return {k: v for k, v in held.items() if k != target}

        with pytest.raises(lcpatch.StoreError, match="layer 0"):
            lcpatch.load_cache(rewritten(path, tensors=drop), model)
    extra = rewritten(path, tensors=lambda held: held | {"9.keys": torch.zeros(1)})
    with pytest.raises(lcpatch.StoreError, match=r"unknown tensor '9.keys'"):
        lcpatch.load_cache(extra, model)


def test_layers_that_have_seen_different_numbers_of_tokens_are_refused(tmp_path):
    path, _, model, _ = saved("h2o", tmp_path)

    def more(header):
        header["layers"][0]["numbers"]["seen"] += 1
        return header

    with pytest.raises(lcpatch.StoreError, match=r"have seen different numbers of tokens: \[80, 81\]"):
        lcpatch.load_cache(rewritten(path, more), model)


# Damage.


@pytest.mark.parametrize("name", ["h2o", "tiered"])
def test_a_flipped_bit_is_refused(name, tmp_path):
    """Wherever it is: in safetensors' header, in ours, in a tensor."""
    path, cache, model, text = saved(name, tmp_path)
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")  # of the tensors
    random = Random(0)
    places = [random.randrange(begin) for _ in range(300)] + [random.randrange(begin, len(data)) for _ in range(100)]
    unseen = 0
    for place in places:
        bit = 1 << random.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(lcpatch.StoreError):
            lcpatch.load_cache(path, model)
        if place >= begin:
            lcpatch.load_cache(path, model, verify=False)
            unseen += 1
        data[place] ^= bit
    assert unseen == 100  # negative control
    path.write_bytes(data)
    assert torch.equal(continued(model, lcpatch.load_cache(path, model), *text), continued(model, cache, *text))


def test_what_is_damaged_is_said(tmp_path):
    path, _, model, _ = saved("h2o", tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(lcpatch.StoreError, match=r"is damaged: its tensor '\d.\w+' is not what was saved; save"):
        lcpatch.load_cache(path, model)
    path.write_bytes(data.replace(b"h2o", b"h3o"))
    for read in (lambda: lcpatch.load_cache(path, model, verify=False), lambda: prefix_file.read_header(path)):
        with pytest.raises(lcpatch.StoreError, match="is damaged: its header is not what was saved; save it anew"):
            read()
    path.write_bytes(data.replace(prefix_file.CHECKSUM.encode(), b"lcpatch_cache_crc33"))
    with pytest.raises(lcpatch.StoreError, match="is damaged: the checksum of its header is gone"):
        lcpatch.load_cache(path, model)
    with pytest.raises(ValueError, match="verify='false' must be True or False"):
        lcpatch.load_cache(path, model, verify="false")


def test_a_file_without_checksums_is_read(tmp_path):
    """Of format 1."""
    path, cache, model, text = saved("h2o", tmp_path)
    header = {**header_of(path), "format": 1}
    del header["checksums"]
    save_file(load_file(path), tmp_path / "old", metadata={prefix_file.KEY: json.dumps(header)})
    with pytest.warns(UserWarning, match="of a format without checksums: what it holds is not verified"):
        loaded = lcpatch.load_cache(tmp_path / "old", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcpatch.load_cache(tmp_path / "old", model, verify=False)
    assert torch.equal(continued(model, loaded, *text), continued(model, cache, *text))


# Writing.


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path, cache, *_ = saved("h2o", tmp_path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_file, "save_file", full)
    with pytest.raises(lcpatch.StoreError, match=r"what was there is untouched.*No space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.safetensors"]


def test_a_file_can_be_read_by_whom_any_new_file_can(tmp_path):
    before = os.umask(0o027)
    try:
        path, *_ = saved("h2o", tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_writers_and_readers_of_one_file_never_see_half_of_one(tmp_path):
    path, cache, model, _ = saved("h2o", tmp_path)
    other = make("h2o", model)
    feed(model, tokens(1, 50), other, [50])
    failed, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                assert lcpatch.load_cache(path, model).get_seq_length() in (50, 80)
            except Exception as error:
                failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=lambda c=c: [c.save(path) for _ in range(8)]) for c in (cache, other)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failed
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.safetensors"]


@pytest.mark.parametrize("smaller", [False, True])
def test_a_file_that_is_replaced_while_it_is_opened_is_opened_anew(smaller, tmp_path, monkeypatch):
    """safetensors opens it twice: for its header, and for the data, which must not be another file's."""
    path, _, model, _ = saved("h2o", tmp_path)
    other, opened = make("h2o", model), []
    feed(model, tokens(1, 50), other, [50])

    def replaced(*args, **kwargs):
        opened.append(safe_open(*args, **kwargs))
        if len(opened) == 1:
            other.save(path)
            if smaller:  # what torch then says
                raise RuntimeError("size <40640> is smaller than the required mapping size <42256>")
        return opened[-1]

    monkeypatch.setattr(prefix_file, "safe_open", replaced)
    assert lcpatch.load_cache(path, model).get_seq_length() == 50
    assert len(opened) == 2
