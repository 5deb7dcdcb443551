"""Mutated sidecars: what is read is a patch, everything else is refused with a `ValueError`."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lcpatch import PatchConfig
from lcpatch.hub.sidecar import read_config
from lcpatch.patching.resolve import pattern_of

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
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))
PLACES = [(key,) for key in VALID] + [("patch", key) for key in VALID["patch"]]
PLACES += [("patch", "options", key) for key in VALID["patch"]["options"]]


def read(raw: bytes) -> PatchConfig | None:
    """The patch in these bytes, or None if they were refused."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lcpatch_config.json").write_bytes(raw)
        try:
            patch = read_config(Path(folder))
            pattern_of(patch)
        except ValueError:
            return None
        return patch


@given(st.sampled_from(PLACES), VALUES)
@settings(max_examples=150, deadline=None)
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
@settings(max_examples=150, deadline=None)
def test_bytes_replaced(place: int, inserted: bytes, removed: int):
    raw = json.dumps(VALID).encode()
    place %= len(raw)
    read(raw[:place] + inserted + raw[place + removed :])


def test_the_valid_one_is_read():
    assert read(json.dumps(VALID).encode()) == PatchConfig.from_dict(VALID["patch"])
