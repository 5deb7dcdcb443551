"""`generate(custom_generate=lcpatch.decode_ahead)`: the tokens of plain `generate`, and the host looks while the device
works."""

import pytest
import torch
from cache_cases import ALL, compiling, left_padding, make, make_model
from models import VOCAB, build, tokens
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import lcpatch
from lcpatch.caches import cache as container
from lcpatch.hf import decode_ahead as module

NEW = 20
MASK = left_padding([0, 7], 50)
COMPILED = {"h2o": lcpatch.H2OCache, "sink": lcpatch.SinkCache, "cluster": lcpatch.ClusterCache}


class Processor(LogitsProcessor):
    """Notes what it is called with, and changes scores by all that came before."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, input_ids, scores):
        self.seen.append(("scores", input_ids.clone()))
        return scores - input_ids.sum(-1, keepdim=True) % 7 * (torch.arange(VOCAB) % 3 == 0)


class Stop(StoppingCriteria):
    """Notes what it is called with, and stops row r after `ends[r]` tokens."""

    def __init__(self, seen, prompt, ends):
        self.seen, self.ends = seen, prompt + torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        self.seen.append(("stop", input_ids.clone()))
        return input_ids.shape[1] >= self.ends


class Streamer:
    """Notes what it is given."""

    def __init__(self, seen):
        self.seen = seen

    def put(self, value):
        self.seen.append(("put", value.clone()))

    def end(self):
        self.seen.append(("end", torch.zeros(0)))


def new_cache(name, model, **options):
    return DynamicCache(config=model.config) if name == "dynamic" else make(name, model, **options)


def both(model, ids, cache, **settings):
    """Plain `generate` and ours, each with its own cache: tokens, the next random number, who was called with what."""
    results, ends = [], settings.pop("ends", (NEW, NEW))
    for ahead in (False, True):
        torch.manual_seed(0)
        seen, how = [], {"custom_generate": lcpatch.decode_ahead} if ahead else {}
        how["stream_to" if ahead else "streamer"] = Streamer(seen)
        given = {"do_sample": False, "max_new_tokens": NEW, "past_key_values": cache(), **settings, **how}
        given["logits_processor"] = LogitsProcessorList([Processor(seen)])
        given["stopping_criteria"] = StoppingCriteriaList([Stop(seen, ids.shape[1], ends)])
        results.append((model.generate(ids, **given), torch.rand(1), seen))
    return results


def check_equal(plain, ahead):
    assert torch.equal(plain[0], ahead[0])
    assert torch.equal(plain[1], ahead[1])
    for (kind, one), (other_kind, other) in zip(plain[2], ahead[2], strict=True):
        assert kind == other_kind
        assert torch.equal(one, other)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "padded": {"attention_mask": MASK},
    "ends": {"attention_mask": MASK, "ends": (4, 11), "eos_token_id": [5, 6], "pad_token_id": 0},
    "sampled ends": {"do_sample": True, "eos_token_id": [*range(5, 15)], "pad_token_id": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dynamic", *ALL])
def test_tokens_and_random_numbers_are_those_of_generate(name, way):
    model = make_model(name)
    plain, ahead = both(model, tokens(2, 50), lambda: new_cache(name, model, small=True), **WAYS[way])
    check_equal(plain, ahead)
    if way.endswith("ends"):
        assert plain[0].shape[1] < 50 + NEW


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 16},
        {"num_return_sequences": 3, "do_sample": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "attention_mask": MASK},
        {"max_new_tokens": 1},
        {"min_new_tokens": 8, "eos_token_id": [*range(5, 40)], "pad_token_id": 0},
    ],
    ids=lambda s: "-".join(s),
)
def test_other_settings(settings):
    model = build()
    ends = (NEW,) * (2 * settings.get("num_return_sequences", 1))
    check_equal(*both(model, tokens(2, 50), lambda: None, ends=ends, **settings))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "qwen3"])
def test_families(family):
    """Those with windows too: a mask for each type of layer."""
    model = build(family)
    check_equal(*both(model, tokens(2, 50), lambda: None))
    check_equal(*both(model, tokens(2, 50), lambda: None, attention_mask=MASK, ends=(3, 6)))


def test_embeddings_instead_of_tokens():
    model = build()
    given = {"inputs_embeds": model.get_input_embeddings()(tokens(2, 30)), "do_sample": False, "max_new_tokens": 9}
    assert torch.equal(model.generate(**given), model.generate(**given, custom_generate=lcpatch.decode_ahead))


def ending(model, ids, name):
    """Settings under which the rows of `ids` end at different steps, before the greatest length."""
    out = model.generate(ids, past_key_values=new_cache(name, model, small=True), do_sample=False, max_new_tokens=NEW)
    stops = [int(out[row, 50 + 5 + 4 * row]) for row in range(len(ids))]
    return {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": stops, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["dynamic", *ALL, *(f"{name}, compiled" for name in COMPILED)])
def test_the_next_turn_goes_on_after_an_early_end(name):
    """The last token has been read: as if it had been fed alone. So the next turn reads what is new, by either loop."""
    name, *compiled = name.split(", ")
    model, ids, more = make_model(name), tokens(2, 50), tokens(2, 9, seed=8)
    options = {"compiled": True} if compiled else {}
    settings = ending(model, ids, name)
    fed = new_cache(name, model, small=True, **options)
    out = model.generate(ids, past_key_values=fed, **settings)
    assert fed.get_seq_length() + 1 == out.shape[1] < 50 + NEW
    with torch.no_grad():
        model(out[:, -1:], past_key_values=fed)
    turn = torch.cat([out, more], 1)
    second = {"attention_mask": torch.ones_like(turn), "do_sample": False, "max_new_tokens": 12}
    want = model.generate(turn, past_key_values=fed, **second)
    for how in ({}, {"custom_generate": lcpatch.decode_ahead}):
        cache = new_cache(name, model, small=True, **options)
        got = model.generate(ids, past_key_values=cache, custom_generate=lcpatch.decode_ahead, **settings)
        assert torch.equal(got, out)
        assert cache.get_seq_length() == out.shape[1]
        assert torch.equal(model.generate(turn, past_key_values=cache, **second, **how), want)
        only_new = new_cache(name, model, small=True, **options)
        model.generate(ids, past_key_values=only_new, custom_generate=lcpatch.decode_ahead, **settings)
        part = model.generate(more, past_key_values=only_new, **second, **how)
        assert torch.equal(part[:, more.shape[1] :], want[:, turn.shape[1] :])


@pytest.mark.parametrize("name", ["dynamic", *ALL])
def test_a_turn_of_full_length_leaves_the_cache_as_generate_does(name):
    model, ids, lengths = make_model(name), tokens(2, 50), []
    for how in ({}, {"custom_generate": lcpatch.decode_ahead}):
        cache = new_cache(name, model, small=True)
        out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=6, **how)
        lengths.append(cache.get_seq_length())
        again = model.generate(out, past_key_values=cache, do_sample=False, max_new_tokens=6, **how)
    assert lengths == [55, 55]
    whole = model.generate(ids, past_key_values=new_cache(name, model), do_sample=False, max_new_tokens=12)
    assert again.shape == whole.shape


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_serves_both_loops_every_turn_and_every_cache(name, padded):
    model, ids, graphs = build(), tokens(2, 50), []
    given = {"do_sample": False, "max_new_tokens": 40, "compile_config": compiling(graphs)}
    mask = {"attention_mask": MASK} if padded else {}

    def cache():
        return COMPILED[name](model, 24, evict_every=7, compiled=True)

    want = model.generate(ids, past_key_values=cache(), **given, **mask)
    assert len(graphs) == 1
    mine = cache()
    out = model.generate(ids, past_key_values=mine, custom_generate=lcpatch.decode_ahead, **given, **mask)
    assert torch.equal(out, want)
    turn = torch.cat([out, tokens(2, 13, seed=3)], 1)
    if padded:
        mask = {"attention_mask": torch.cat([MASK, torch.ones(2, turn.shape[1] - 50, dtype=torch.long)], 1)}
    else:
        mask = {"attention_mask": torch.ones_like(turn)}  # or a 0 that was generated would be taken for a pad
    model.generate(turn, past_key_values=mine, custom_generate=lcpatch.decode_ahead, **given, **mask)
    assert len(graphs) == 1


def test_a_static_cache_compiles_once():
    model, ids, graphs = build(), tokens(2, 50), []
    given = {"do_sample": False, "max_new_tokens": NEW, "compile_config": compiling(graphs)}
    for how in ({}, {"custom_generate": lcpatch.decode_ahead}, {}):
        model.generate(ids, past_key_values=StaticCache(model.config, max_cache_len=100), **given, **how)
    assert len(graphs) == 1


@pytest.fixture
def log(monkeypatch):
    """What happens, in order: "wait" where a number of a tensor goes to the host, "read" where the loop looks."""
    entries = []

    def note(owner, name, entry):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            entries.append(entry)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("item", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        note(torch.Tensor, name, "wait")
    note(module._News, "read", "read")
    note(container, "get_ready", "announced")
    return entries


def test_no_wait_but_one_that_looks_back(log):
    """Compiled, so that the forward's own Python runs once: with `generate` the cache and the loop wait every token."""
    model, ids, waits = build(), tokens(2, 50), {}
    given = {"do_sample": False, "compile_config": compiling([])}
    for name, how in (("plain", {}), ("ahead", {"custom_generate": lcpatch.decode_ahead})):
        counts = []
        for new in (3, 10, 30):  # the first compiles
            cache = lcpatch.H2OCache(model, 200, compiled=True)  # nothing goes, so nothing is counted again
            log.clear()
            model.generate(ids, past_key_values=cache, max_new_tokens=new, **given, **how)
            counts.append({entry: log.count(entry) for entry in ("wait", "read")})
        waits[name] = {entry: (counts[2][entry] - counts[1][entry]) / 20 for entry in counts[0]}
    assert waits == {"plain": {"wait": 2, "read": 0}, "ahead": {"wait": 0, "read": 1}}
    assert [entry for entry in log if entry != "wait"][-7:] == [*["announced", "read"] * 3, "read"]


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "padded"])
def test_inputs_are_prepared_once_where_only_token_and_position_change(mask, monkeypatch):
    model, ids, calls = build(), tokens(2, 50), []
    real = model.prepare_inputs_for_generation.__func__

    def counted(self, *args, **kwargs):
        calls.append(kwargs.get("next_sequence_length"))
        return real(self, *args, **kwargs)

    def calls_of(cache):
        calls.clear()
        given = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": mask}
        model.generate(ids, past_key_values=cache, custom_generate=lcpatch.decode_ahead, **given)
        return len(calls)

    monkeypatch.setattr(module.GenerationMixin, "prepare_inputs_for_generation", counted)
    assert calls_of(lcpatch.H2OCache(model, 24, compiled=True)) == 2  # the prompt, and the first token
    if mask is not None:
        assert calls_of(DynamicCache(config=model.config)) == NEW  # its mask grows
    model.prepare_inputs_for_generation = lambda *args, **kwargs: counted(model, *args, **kwargs)  # as PEFT does
    assert calls_of(lcpatch.H2OCache(model, 24, compiled=True)) == NEW


def test_a_mask_that_is_needed_again_is_as_long_as_the_text(monkeypatch):
    """Inputs that were moved on for a while are made anew from all that has come."""
    model, ids, answers = build(), tokens(2, 50), iter([True, True, False] * NEW)
    given = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": MASK}
    want = model.generate(ids, past_key_values=lcpatch.H2OCache(model, 24), **given)
    real = module._needs_no_mask
    monkeypatch.setattr(module, "_needs_no_mask", lambda cache: real(cache) and next(answers))
    cache = lcpatch.H2OCache(model, 24, compiled=True)
    assert torch.equal(model.generate(ids, past_key_values=cache, custom_generate=lcpatch.decode_ahead, **given), want)
    assert next(answers) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "does greedy_search and sample, this is beam_search; leave custom_generate="),
        ({"prompt_lookup_num_tokens": 3}, "this is assisted_generation; leave"),
        ({"return_dict_in_generate": True}, "returns token ids, not return_dict_in_generate=True; leave"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_it_does_not_do_names_the_plain_call(settings, message):
    with pytest.raises(ValueError, match=message):
        build().generate(tokens(1, 20), max_new_tokens=3, custom_generate=lcpatch.decode_ahead, **settings)


def test_encoders_and_shards_are_refused(monkeypatch):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    with pytest.raises(ValueError, match="t5 has an encoder; leave"):
        model.generate(tokens(1, 20), max_new_tokens=3, custom_generate=lcpatch.decode_ahead)
    monkeypatch.setattr(module, "is_fsdp_managed_module", lambda _: True)
    model, ids = build(), tokens(1, 20)
    model.generate(ids, max_new_tokens=3, custom_generate=lcpatch.decode_ahead)  # one process: no others to wait for
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="ranks of a sharded model in step; leave"):
        model.generate(ids, max_new_tokens=3, synced_gpus=False, custom_generate=lcpatch.decode_ahead)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers(bad):
    def spoil(input_ids, scores):
        if input_ids.shape[1] > 53:
            scores[1] = bad
        return scores

    given = {"do_sample": True, "max_new_tokens": 9, "logits_processor": LogitsProcessorList([spoil])}
    with pytest.raises(RuntimeError, match="row 1: its scores hold nan or inf"):
        build().generate(tokens(2, 50), custom_generate=lcpatch.decode_ahead, **given)


@pytest.mark.parametrize("name", ["dynamic", "h2o"])
def test_a_text_without_anything_new(name):
    """Plain `generate` would read it all once more."""
    model, ids = build(), tokens(1, 50)
    settings = ending(model, ids, "dynamic")
    cache = new_cache(name, model)
    out = model.generate(ids, past_key_values=cache, custom_generate=lcpatch.decode_ahead, **settings)
    given = {"past_key_values": cache, "do_sample": False, "max_new_tokens": 5, "custom_generate": lcpatch.decode_ahead}
    with pytest.raises(ValueError, match=f"has read all {out.shape[1]} tokens of this text"):
        model.generate(out, **given)
    cache.crop(-1)
    assert torch.equal(model.generate(out, **given), model.generate(out, do_sample=False, max_new_tokens=5))
