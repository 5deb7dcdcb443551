"""A patch as plain data: what is written can be read, and what cannot be read is refused with its reason."""

import json

import pytest

from lcpatch import PatchConfig
from lcpatch.core.config import FORMAT

CONFIGS = [
    PatchConfig("s2"),
    PatchConfig("s2", {"stride": 8, "local_blocks": 2}, layers=(4, 0, 2, 2), mode="always"),
    PatchConfig("sf", {"group_ratio": 0.25}, layers="every_2", mode="train", sinks="logit:-12.5", dense="eager"),
    PatchConfig("sink", mode="never", sinks="tokens:8"),
    PatchConfig("s2", sinks="prefix:2:-1.5"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
def test_round_trip(config: PatchConfig, tmp_path):
    assert PatchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "patch.json"
    path.write_text(json.dumps(config.to_dict()))
    assert PatchConfig.from_file(path) == config


def test_yaml(tmp_path):
    path = tmp_path / "patch.yaml"
    path.write_text("method: s2\noptions: {stride: 8}\nlayers: [2, 0]\nsinks: tokens\n")  # no `format`: hand-written
    assert PatchConfig.from_file(path) == PatchConfig("s2", {"stride": 8}, layers=(0, 2), sinks="tokens")


def test_the_format_is_written():
    assert PatchConfig("s2").to_dict() == {"format": FORMAT, "method": "s2", "options": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": FORMAT + 1, "method": "s2"}, rf"format {FORMAT + 1}; .* pip install -U lcpatch"),
        ({"format": "new", "method": "s2"}, "format 'new'"),
        ({"format": 0, "method": "s2"}, "format 0"),
        ({"method": "s2", "stride": 8}, r"unknown key 'stride' in a patch; keys: format, dense"),
        ({"options": {}}, "a patch needs `method`"),
        ({"method": 2}, "a patch needs `method`"),
        ({"method": "s2", "options": [8]}, r"options=\[8\] must be a mapping"),
        ({"method": "s2", "mode": "eval"}, r"mode='eval' is not one of 'train', 'always', 'never'"),
        ({"method": "s2", "layers": []}, "must be a non-empty list of layer indices"),
        ({"method": "s2", "layers": [0, -1]}, "must be a non-empty list of layer indices"),
        ({"method": "s2", "layers": [0.5]}, "must be a non-empty list of layer indices"),
        ({"method": "s2", "layers": 3}, "layers=3 must be"),
        ({"method": "s2", "sinks": "token"}, "sinks='token' must be 'tokens', 'tokens:N'"),
        ({"method": "s2", "sinks": "tokens:0"}, "sinks='tokens:0' must be"),
        ({"method": "s2", "sinks": "tokens:2.5"}, "sinks='tokens:2.5' must be"),
        ({"method": "s2", "sinks": "tokens:inf"}, "sinks='tokens:inf' must be"),
        ({"method": "s2", "sinks": "logit:nan"}, "sinks='logit:nan' must be"),
        ({"method": "s2", "sinks": "logit:x"}, "sinks='logit:x' must be"),
        ({"method": "s2", "sinks": 4}, "sinks=4 must be"),
        *(
            ({"method": "s2", "sinks": sinks}, f"sinks='{sinks}' must be")
            for sinks in ("prefix:0", "prefix:257", "prefix:1.5", "prefix:2:x", "prefix:2:nan", "prefix:2:3:4")
        ),
        ({"method": "s2", "sinks": "tokens:2:3"}, "sinks='tokens:2:3' must be"),
        ({"method": "s2", "sinks": "logit:1:2"}, "sinks='logit:1:2' must be"),
    ],
)
def test_refused(data: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PatchConfig.from_dict(data)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "[s2]", "must hold a mapping"),
    ],
)
def test_bad_files(name: str, text: str, error: str, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        PatchConfig.from_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        PatchConfig.from_file(tmp_path / "none.yaml")
