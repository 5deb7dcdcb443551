"""StreamingLLM's cache: positions within the cache, exactly, for every RoPE that is a fixed rotation."""

import pytest
import torch
from cache_cases import feed, left_padding
from models import build, tokens
from noise import distance, model_budget
from odd_models import make

import lcpatch
from lcpatch.caches.sink import SinkLayer
from lcpatch.hf.models import attention_modules
from lcpatch.hf.rotation import rotations_of

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
WINDOW, SINKS = 20, 3


def expected(model, ids, kept):
    """What the paper's cache gives a model of one layer, whose keys depend on nothing but their own token: the plain
    forward over the sinks, the window and the token itself, positions counted within them."""
    rows = []
    for t in range(ids.shape[1]):
        before = ids[:, :t] if t <= kept else torch.cat([ids[:, :SINKS], ids[:, t - kept + SINKS : t]], 1)
        with torch.no_grad():
            rows.append(model(torch.cat([before, ids[:, t : t + 1]], 1), use_cache=False).logits[:, -1:])
    return torch.cat(rows, 1)


@pytest.mark.parametrize("rope", ROPE)
def test_rolling_is_the_plain_model_over_what_is_kept(rope):
    model = build(num_hidden_layers=1, rope_parameters=ROPE[rope])
    ids = tokens(2, 70)
    cache = lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS)
    got = feed(model, ids, cache, [1] * 70)
    assert distance(got, expected(model, ids, WINDOW)) <= model_budget(model, ids)


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gemma3_text", "smollm3", "qwen3"])
@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
def test_rolling_in_other_layouts(family):
    layers = {"layer_types": ["full_attention"]} if family == "gemma3_text" else {}
    layers |= {"no_rope_layers": [1]} if family == "smollm3" else {}
    model = build(family, num_hidden_layers=1, **layers)
    ids = tokens(1, 50)
    got = feed(model, ids, lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS), [1] * 50)
    assert distance(got, expected(model, ids, WINDOW)) <= model_budget(model, ids)


@pytest.mark.parametrize("prefix", ["Phi", "Exaone4", "ModernBertDecoder"])
def test_rolling_where_a_layer_turns_a_part_of_its_keys_or_nothing(prefix):
    whole = {} if prefix == "Phi" else {"layer_types": ["full_attention"]}
    model = make(prefix, num_hidden_layers=1, **whole).eval()
    ids = tokens(1, 50)
    got = feed(model, ids, lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS), [1] * 50)
    assert distance(got, expected(model, ids, WINDOW)) <= model_budget(model, ids)


def test_a_model_in_training_is_asked_without_dropout_and_left_so():
    model = build(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    lcpatch.SinkCache(model)
    assert [layer.training for layer in model.model.layers] == [True, False]


def test_absolute_positions_are_the_models_own_under_a_mask():
    """Whatever the depth: tokens fed one by one see sinks and window only, as under the pattern of the same name."""
    model = build()
    ids = tokens(2, 70)
    budget = model_budget(model, ids)
    got = feed(model, ids, lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS, positions="absolute"), [1] * 70)
    lcpatch.apply(model, "sink", num_sinks=SINKS, window=WINDOW - SINKS + 1)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert distance(got, want) <= budget


def test_absolute_is_not_rolling():
    """Negative control of both tests above."""
    model = build(num_hidden_layers=1)
    ids = tokens(2, 70)
    got = feed(model, ids, lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS, positions="absolute"), [1] * 70)
    assert distance(got, expected(model, ids, WINDOW)) > model_budget(model, ids)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_rows_of_a_batch_roll_for_themselves(codec):
    model = build()
    ids, mask = tokens(3, 70), left_padding([0, 41, 12], 70)
    budget, sizes = model_budget(model, ids), [30, 1, 1, 15, *[1] * 23]
    options = {"budget": WINDOW, "num_sinks": SINKS, "codec": codec}
    got = feed(model, ids, lcpatch.SinkCache(model, **options), sizes, mask)
    if codec:  # where rounding falls the other way, a row differs by far less than the codec loses
        plain = feed(model, ids, lcpatch.SinkCache(model, **options | {"codec": None}), sizes, mask)
        budget = distance(got[mask.bool()], plain[mask.bool()]) / 100
    for row, pads in enumerate([0, 41, 12]):
        ends = [max(sum(sizes[: n + 1]) - pads, 0) for n in range(len(sizes))]
        parts = [b - a for a, b in zip([0, *ends], ends, strict=False) if b > a]
        alone = feed(model, ids[row : row + 1, pads:], lcpatch.SinkCache(model, **options), parts)
        assert distance(got[row : row + 1, pads:], alone) <= budget


def test_endless_generation_at_fixed_memory_stays_what_it_is():
    """Sinks are turned from their first rotation: nothing adds up over hundreds of steps."""
    model = build(num_hidden_layers=1)
    ids = tokens(1, 400)
    cache = lcpatch.SinkCache(model, budget=WINDOW, num_sinks=SINKS)
    feed(model, ids[:, :30], cache, [1] * 30)
    held = cache.memory()
    got = feed(model, ids[:, 30:], cache, [1] * 370)
    assert cache.memory() == held
    assert distance(got[:, -40:], expected(model, ids, WINDOW)[:, -40:]) <= model_budget(model, ids)


@pytest.mark.parametrize(
    ("rope", "word"),
    [({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "type 'dynamic' changes with the length")],
)
def test_rope_that_depends_on_the_length_is_refused(rope, word):
    model = build(rope_parameters=rope)
    with pytest.raises(lcpatch.UnsupportedModelError, match=word):
        lcpatch.SinkCache(model)
    lcpatch.SinkCache(model, positions="absolute")


def test_an_embedding_that_is_no_rotation_is_refused():
    model = build()
    rotary = next(m for m in model.modules() if "RotaryEmbedding" in type(m).__name__)
    real = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(t * (1 + position_ids[..., None] / 9) for t in real(x, position_ids))
    with pytest.raises(lcpatch.UnsupportedModelError, match="not one rotation per position"):
        rotations_of(model, attention_modules(model), "SinkCache")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_rotation_is_found_in_every_dtype(dtype):
    lcpatch.SinkCache(build("gpt_neox", num_hidden_layers=12).to(dtype))


def test_positions_that_are_added_to_tokens_are_refused():
    model = make("OPT").eval()
    with pytest.raises(lcpatch.UnsupportedModelError, match="opt has no rotary embedding to turn, it adds positions"):
        lcpatch.SinkCache(model)
    lcpatch.SinkCache(model, positions="absolute")


def test_wrong_positions():
    with pytest.raises(ValueError, match="positions='relative' is not one of"):
        lcpatch.SinkCache(build(), positions="relative")
    assert SinkLayer.owner == "SinkCache"
