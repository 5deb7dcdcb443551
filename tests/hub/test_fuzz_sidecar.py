"""Mutated sidecars, configs, cache headers: what is valid is read, everything else is refused with a `ValueError`."""

import json
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcpatch import PatchConfig
from lcpatch.caches import prefix_file
from lcpatch.caches.scorers import Bookmarks
from lcpatch.core.errors import LcpatchError
from lcpatch.hf.layers import with_sink_tokens
from lcpatch.hub.about import About
from lcpatch.hub.card import Subject, card_text
from lcpatch.hub.load import MAX_MODEL_CONFIG_BYTES, patch_in
from lcpatch.hub.sidecar import MAX_CONFIG_BYTES, read_config, read_positions
from lcpatch.patching.resolve import pattern_of
from lcpatch.patterns import LayerShape
from lcpatch_kernels import BlockSparseSpec

VALID = {
    "format": 1,
    "lcpatch_version": "0.1.0",
    "patch": {
        "format": 1,
        "method": "s2",
        "options": {"block_size": 16, "local_blocks": 1, "stride": 3, "share": "kv_head"},
        "layers": [0, 1],
        "mode": "always",
        "sinks": "tokens:4",
        "dense": "sdpa",
    },
    "positions": {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
CONFIG = {"model_type": "llama", "lcpatch": {**VALID["patch"], "format": 2, "specs": {"0": "16 1 0", "1": "16 1 0"}}}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512}
LARGE = st.integers(28, 140).map(lambda n: 2**n) | st.integers(10, 60).map(lambda n: 10**n)
SCALARS = st.none() | st.booleans() | st.integers() | LARGE | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))
PLACES = [(key,) for key in VALID] + [("patch", key) for key in VALID["patch"]]
PLACES += [("patch", "options", key) for key in VALID["patch"]["options"]]
PLACES += [("positions", key) for key in VALID["positions"]] + [("positions", "rope_parameters", "rope_theta")]


def read(raw: bytes) -> PatchConfig | None:
    """The patch in these bytes, which can be compiled and has a card, or None if they were refused."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lcpatch_config.json").write_bytes(raw)
        try:
            patch = read_config(Path(folder))
            rules = pattern_of(patch).rules(LayerShape(8, 2, 0, 2))
            BlockSparseSpec.of(with_sink_tokens(rules, patch.sinks)).density(300)
            read_positions(Path(folder))
            card_text(Subject("me/model", patch, None, CONFIG), About())
        except ValueError:
            return None
        return patch


@given(st.sampled_from(PLACES), VALUES)
@settings(max_examples=150)
def test_one_value_replaced(place: tuple[str, ...], value: Any):
    data = json.loads(json.dumps(VALID))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    patch = read(json.dumps(data).encode())
    if patch is not None:
        assert PatchConfig.from_dict(patch.to_dict()) == patch


@given(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 4))
@settings(max_examples=150)
def test_bytes_replaced(place: int, inserted: bytes, removed: int):
    raw = json.dumps(VALID).encode()
    place %= len(raw)
    read(raw[:place] + inserted + raw[place + removed :])


def carried(raw: bytes) -> PatchConfig | None:
    """The patch in a `config.json` of these bytes, or None if it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(raw)
        try:
            return patch_in(Path(folder), "x", is_adapter=False)
        except ValueError:
            return None


@given(st.sampled_from([(), *((key,) for key in CONFIG["lcpatch"]), ("specs", "0"), ("specs", "x")]), VALUES)
@settings(max_examples=150)
def test_one_value_of_a_config_replaced(place: tuple[str, ...], value: Any):
    data = json.loads(json.dumps(CONFIG))
    inner, way = data, ("lcpatch", *place)
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    patch = carried(json.dumps(data).encode())
    if patch is not None:
        assert PatchConfig.from_dict(patch.to_dict()) == patch
        assert all(isinstance(spec, str) for spec in data["lcpatch"].get("specs", {}).values())


def test_older_patches_are_read():
    """Of format 1, which said nothing of each layer's integers."""
    old = {**CONFIG["lcpatch"], "format": 1}
    del old["specs"]
    assert carried(json.dumps({"lcpatch": old}).encode()) == carried(json.dumps(CONFIG).encode()) is not None


def header(raw: bytes) -> None:
    """Read a cache's header of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cache.safetensors")
        save_file({"0.keys": torch.zeros(1)}, file, metadata={prefix_file.KEY: raw.decode()})
        prefix_file.read_header(file)


@given(st.sampled_from(["format", "cache", "options", "model", "layers", "tokenizer", "more"]), VALUES)
@settings(max_examples=100)
def test_one_value_of_a_header_replaced(key: str, value: Any):
    valid = {"format": 1, "cache": "h2o", "options": {}, "model": {}, "layers": [], "tokenizer": None}
    header(json.dumps(valid).encode())
    try:
        header(json.dumps({**valid, key: value}).encode())
    except ValueError:
        return
    kinds = {"format": int, "cache": str, "options": dict, "model": dict, "layers": list}
    assert isinstance(value, kinds.get(key, object))


SHAPES = st.lists(st.integers(0, 40), max_size=5).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@given(SHAPES, SHAPES, DTYPES, st.sampled_from(["query", "key", "other"]), VALUES)
@settings(max_examples=80)
def test_scorers_of_any_shape(
    shape: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype, name: str, about: Any
):
    valid = {"kind": "bookmarks", "version": 1}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scorer.safetensors")
        tensors = {"query": torch.zeros(shape, dtype=dtype), name: torch.zeros(other, dtype=dtype)}
        for said in (valid, about):
            save_file(tensors, file, metadata={"lcpatch": json.dumps(said)})
            try:
                found = Bookmarks.load(file)
            except LcpatchError:
                continue
            assert said == valid
            assert found.query.shape == found.key.shape == shape
            assert dtype.is_floating_point


def test_a_scorer_is_not_built_larger_than_its_file(tmp_path: Path):
    flat = torch.zeros(1, 1, 1, 100_000)  # square it would be 37 GiB
    for text in (json.dumps({"kind": "bookmarks", "version": 1}), "[" * 10**6):
        save_file({"query": flat, "key": flat.clone()}, tmp_path / "x", metadata={"lcpatch": text})
        with pytest.raises(LcpatchError, match="not bookmarks of this version"):
            Bookmarks.load(tmp_path / "x")


READERS = {"sidecar": (read, MAX_CONFIG_BYTES), "config": (carried, MAX_MODEL_CONFIG_BYTES)}


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"x",', b"1,", b"[" * 900 + b"]" * 900 + b","])
@pytest.mark.parametrize("what", [*READERS, "header"])
def test_none_takes_more_memory_than_its_size_allows(what: str, part: bytes):
    reader: Callable[[bytes], Any]
    reader, most = READERS.get(what, (header, prefix_file.MAX_HEADER))
    raw = b'{"lcpatch": [' + part * ((most - 20) // len(part)) + b"0]}"
    assert len(raw) <= most
    tracemalloc.start()
    try:
        if what == "header":
            with pytest.raises(ValueError, match="header"):
                header(raw)
        else:
            assert reader(raw) is None
        assert tracemalloc.get_traced_memory()[1] <= max(64 * 2**20, 4 * len(raw))
    finally:
        tracemalloc.stop()


def test_the_valid_one_is_read():
    assert read(json.dumps(VALID).encode()) == PatchConfig.from_dict(VALID["patch"])
