"""Every cache of a model whose layers lie on two GPUs, or whose weights wait in host memory: the tokens of one GPU."""

import pytest
import torch
from cache_cases import ALL, feed, generated, left_padding, make, placed
from models import tokens

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
ONE = {"rest": 0, "0": 0, "1": 0, "2": 0, "3": 0}
PLACES = {
    "two GPUs": {"rest": 0, "0": 0, "1": 0, "2": 1, "3": 1},
    "to and fro": {"rest": 0, "0": 1, "1": 0, "2": 1, "3": 0},
    "weights in host memory": {"rest": 0, "0": "cpu", "1": 0, "2": "cpu", "3": 0},
}
every_place = pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[] if p == "weights in host memory" else two_gpus) for p in PLACES]
)


@every_place
@pytest.mark.parametrize("name", ALL)
def test_layers_in_several_places_generate_what_they_do_on_one_gpu(name, place, tmp_path):
    ids, mask = tokens(3, 50).cuda(), left_padding([0, 37, 11], 50).cuda()
    models = [placed(name, tmp_path, devices) for devices in (ONE, PLACES[place])]
    outputs = [generated(name, model, ids, mask) for model in models]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@two_gpus
@pytest.mark.parametrize("name", ALL)
def test_each_layer_keeps_its_past_where_it_computes(name, tmp_path):
    model = placed(name, tmp_path, PLACES["to and fro"])
    cache = make(name, model, small=True)
    feed(model, tokens(2, 60).cuda(), cache, [50, *[1] * 10])
    assert [str(layer.device) for layer in cache.layers] == ["cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    if name in ("retrieval", "tiered"):
        assert 0 < cache.stats(measure=True)["mass_recalled"] <= 1
