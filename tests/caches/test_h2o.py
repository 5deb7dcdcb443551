"""H2O against its definition, spelt out in float64: what is scored, what goes, and what attention then gives."""

import pytest
import torch
from cache_cases import LENGTH, feed, left_padding, make_model
from fingerprint import fingerprint
from models import SHORT, build, tokens
from noise import distance, model_budget
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

import lcpatch
from lcpatch.caches.budget import Budget
from lcpatch.caches.h2o import H2OLayer
from lcpatch.hf.watch import Call, ask
from lcpatch_kernels import DENSE, BlockSparseSpec

HEADS, KV_HEADS, DIM = 6, 3, 16
SPEC = BlockSparseSpec.of([DENSE] * HEADS)


class Definition:
    """One row of H2O with Python's lists: the paper's algorithm, slowly."""

    def __init__(self, layer: H2OLayer) -> None:
        self.layer, self.kept = layer, [[] for _ in range(KV_HEADS)]  # per KV head: [position, key, value, mass]
        self.gone = [0.0] * KV_HEADS
        self.seen = 0

    def step(self, q, k, v):
        """q [H, T, D]; k, v [K, T, D]; returns out [H, T, D]."""
        out = torch.zeros_like(q)
        num = q.shape[1]
        for head in range(KV_HEADS):
            items = self.kept[head]
            if self.layer.kind == "decay":
                for item in items:
                    item[3] *= self.layer.decay**num
            items += [[self.seen + t, k[head, t], v[head, t], 0.0] for t in range(num)]
            keys, values = (torch.stack([item[n] for item in items]) for n in (1, 2))
            position = torch.tensor([item[0] for item in items])
            given = []
            for h in range(head * 2, head * 2 + 2):
                scores = (q[h] @ keys.T) * DIM**-0.5
                now = torch.arange(self.seen, self.seen + num)[:, None]
                p = scores.masked_fill(position > now, -torch.inf).softmax(-1)
                out[h] = p @ values
                given.append(p.sum(0))
            given = torch.stack(given)
            given = {"sum": given.sum, "mean": given.mean, "max": given.amax}[self.layer.group](0)
            for item, mass in zip(items, given, strict=True):
                item[3] += float(mass)
        self.seen += num
        return out

    def evict(self, budget, target):
        """Keep the sinks, the recent ones and the heaviest."""
        sinks, recent = self.layer.budget.protected(budget)
        for head, items in enumerate(self.kept):
            if len(items) <= budget:
                continue
            worth = []
            for n, (position, _, _, mass) in enumerate(items):
                mass = mass / (self.seen - position) if self.layer.kind == "mean" else mass
                young = position >= self.seen - self.layer.grace
                worth.append(torch.inf if n < sinks or n >= len(items) - recent else 1e30 if young else mass)
            best = sorted(range(len(items)), key=lambda n: (-worth[n], n))[:target]
            self.kept[head] = [items[n] for n in sorted(best)]
            self.gone[head] += sum(items[n][3] for n in range(len(items)) if n not in best)


def run(budget: Budget, sizes, **options):
    """The layer and the definition through the same random steps, compared after each."""
    settings = {"score": "sum", "decay": 0.9, "group": "sum", "grace": 0, **options}
    layer = H2OLayer(budget, None, **settings)
    definition = Definition(layer)
    rng = torch.Generator().manual_seed(0)
    for size in sizes:
        q, k, v = (
            torch.randn(1, h, size, DIM, generator=rng, dtype=torch.float64) * 1.5 for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        layer.expected = True
        layer.update(k, v)
        out, _ = ask(layer, Call(q, k, v, SPEC, None, None, None, "auto"))
        want = definition.step(q[0], k[0], v[0])
        assert (out[0] - want).abs().max() <= 64 * torch.finfo(torch.float64).eps * want.abs().max()
        most = budget.of(definition.seen) if size > 1 else layer.budgets[0]
        definition.evict(most, most if size > 1 else most - budget.slack(most) + 1)
        kept = [[item[0] for item in items] for items in definition.kept]
        assert layer.key_positions()[0].tolist() == kept
    return layer, definition


@pytest.mark.parametrize(
    "options",
    [{}, {"group": "mean"}, {"group": "max"}, {"score": "mean"}, {"score": "decay"}, {"grace": 9}],
    ids=lambda options: " ".join(map(str, options.values())) or "paper",
)
@pytest.mark.parametrize("sizes", [[60, *[1] * 40], [20, 25, 1, 1, 30, *[1] * 20]], ids=["prompt", "chunks"])
def test_h2o_is_its_definition(sizes, options):
    layer, definition = run(Budget(16, 2, 0.5), sizes, **options)
    mass = layer.slots["mass"][0].double()
    want = torch.tensor([[item[3] for item in items] for items in definition.kept], dtype=torch.float64)
    assert (mass - want).abs().max() <= len(sizes) * torch.finfo(torch.float32).eps * want.max()
    if layer.kind == "decay":
        assert layer.mass_kept() is None
        return
    held, gone = want.sum(-1), torch.tensor(definition.gone, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert (layer.mass_kept()[0] - held / (held + gone)).abs().max() <= 2 * len(sizes) * eps
    assert layer.mass_kept().max() < 0.99
    if layer.group == "sum":  # every query of both heads gives 1 in all
        given = (mass.sum(-1) + layer.gone[0, :, 0]) / (2 * definition.seen)
        assert (given - 1).abs().max() <= len(sizes) * eps


@pytest.mark.parametrize("compiled", [False, True])
def test_the_share_of_attention_kept_is_told_whatever_happens_to_a_cache(compiled, tmp_path):
    """Of rows with pads alone, of copies in another order, of a file, of what was taken back; 1 with room for all."""
    model, pads = build(), [0, 31]
    ids, mask = tokens(2, LENGTH), left_padding(pads)
    cache = lcpatch.H2OCache(model, budget=24, compiled=compiled)
    assert cache.stats()["mass_kept"] is None
    feed(model, ids, cache, [60, *[1] * 30], mask)
    shares = torch.stack([layer.mass_kept() for layer in cache.layers], 1)
    assert cache.stats()["mass_kept"] == pytest.approx(float(shares.mean()))
    assert list(cache.stats()["mass_kept_by_layer"]) == [0, 1]
    assert 0 < shares.min() <= shares.max() < 1
    for row, skip in enumerate(pads):
        alone = lcpatch.H2OCache(model, budget=24)
        feed(model, ids[row : row + 1, skip:], alone, [60 - skip, *[1] * 30])
        assert distance(torch.stack([layer.mass_kept()[0] for layer in alone.layers]), shares[row]) <= 1e-5
    loaded = lcpatch.load_cache(cache.save(tmp_path / "prefix"), model)
    assert loaded.stats() == cache.stats()
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    now = torch.stack([layer.mass_kept() for layer in cache.layers], 1)
    assert torch.equal(now, shares[[1, 1, 0]])
    cache.reset()
    assert cache.stats()["mass_kept"] is None
    wide = lcpatch.H2OCache(model, budget=500, compiled=compiled)
    feed(model, ids, wide, [60, *[1] * 30], mask)
    wide.crop(-3)
    assert wide.stats()["mass_kept"] == 1


@pytest.mark.parametrize("budget", [Budget(0.25, 2), Budget(40, 4, 10, evict_every=5), Budget(0.5, 0, 3)])
def test_budgets(budget):
    run(budget, [30, 30, 40, *[1] * 45])


def test_a_wrong_score_is_seen():
    """Negative control: a layer that never sees the queries keeps other tokens."""

    class Blind(H2OLayer):
        def observe(self, step):
            pass

    original = globals()["H2OLayer"]
    globals()["H2OLayer"] = Blind
    try:
        with pytest.raises(AssertionError):
            run(Budget(16, 2, 0.5), [60, *[1] * 10])
    finally:
        globals()["H2OLayer"] = original


def test_heavy_tokens_outlive_the_window():
    """A key that every query looks for stays, however old; a cache of the same size without scores loses it."""
    layer = H2OLayer(Budget(16, 0, 8), None, score="sum", decay=0.9, group="sum", grace=0)
    rng = torch.Generator().manual_seed(0)
    wanted = torch.randn(1, 1, 1, DIM, generator=rng)
    for step in range(100):
        k = torch.randn(1, KV_HEADS, 1, DIM, generator=rng)
        if step == 3:
            k = wanted.expand(1, KV_HEADS, 1, DIM)
        layer.expected = True
        layer.update(k, k)
        query = wanted.expand(1, HEADS, 1, DIM) * 2
        ask(layer, Call(query, k, k, SPEC, None, None, None, "auto"))
    assert (layer.key_positions() == 3).any(-1).all()


# With a pattern on the model, and other models.


@pytest.mark.parametrize("method", ["sink", "s2", "shift"])
def test_on_a_patched_model_the_pattern_holds_over_what_is_kept(method):
    """With room for everything: the patched model's own logits. A row does not depend on the rows beside it."""
    model = lcpatch.apply(build(), method, mode="always", **SHORT[method])
    ids, mask = tokens(2, LENGTH), left_padding([0, 31])
    budget = model_budget(build(), ids)
    want = feed(model, ids, None, [LENGTH], mask)
    for sizes in ([LENGTH], [40, 1, 1, 30, 18], [60, *[1] * 30]):
        got = feed(model, ids, lcpatch.H2OCache(model, budget=4096), sizes, mask)
        assert distance(got[mask.bool()], want[mask.bool()]) <= budget
    both = feed(model, ids, lcpatch.H2OCache(model, budget=24), [60, *[1] * 30], mask)
    alone = feed(model, ids[1:, 31:], lcpatch.H2OCache(model, budget=24), [29, *[1] * 30])
    assert distance(both[1:, 31:], alone) <= budget


@pytest.mark.filterwarnings("ignore:.* keep transformers' own cache")
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "phi3", "smollm3"])
def test_families(family):
    """Softcaps, learned sinks, windows in some layers, fused projections: the logits of the model's own cache."""
    attn = "eager" if family in ("gemma2", "gpt_oss") else None
    model = build(family, attn)
    ids, mask = tokens(2, LENGTH), left_padding([0, 31])
    budget = model_budget(model, ids)
    want = feed(model, ids, None, [LENGTH], mask)
    cache = lcpatch.H2OCache(model, budget=4096)
    assert distance(feed(model, ids, cache, [50, 1, 1, 38], mask)[mask.bool()], want[mask.bool()]) <= budget
    small = lcpatch.H2OCache(model, budget=24)
    feed(model, ids, small, [50, *[1] * 40], mask)
    assert small.stats()["kept"] <= 24


def test_layers_with_a_window_are_left_alone_and_it_is_said():
    model = build("gemma3_text")
    with pytest.warns(UserWarning, match=r"layers \[1\] do not attend to their whole past"):
        cache = lcpatch.H2OCache(model, budget=24)
    assert [type(layer).__name__ for layer in cache.layers] == ["H2OLayer", "DynamicSlidingWindowLayer", "H2OLayer"]


def test_a_model_of_windows_alone_is_refused():
    model = build("mistral", sliding_window=20)
    with pytest.raises(lcpatch.UnsupportedModelError, match="no layer that attends to its whole past: its windows"):
        lcpatch.H2OCache(model)


def test_layers_that_read_the_keys_of_others_are_refused():
    """They would be handed a step's own keys for all there are."""
    sizes = {"vocab_size": 61, "vocab_size_per_layer_input": 61, "hidden_size": 32, "hidden_size_per_layer_input": 8}
    sizes |= {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3nTextConfig(
        **sizes,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        laurel_rank=4,
        layer_types=kinds,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=20,
    )
    model = Gemma3nForCausalLM(config)
    before = fingerprint(model)
    with pytest.raises(lcpatch.UnsupportedModelError, match=r"layers \[2, 3\] .* read the keys of other layers"):
        lcpatch.H2OCache(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "must be tokens per KV head"),
        ({"budget": 1.5}, "must be tokens per KV head"),
        ({"budget": True}, "must be tokens per KV head"),
        ({"budget": 4}, "must hold the 4 sinks"),
        ({"budget": 20, "recent": 17}, "at least 21"),
        ({"recent": 0}, "recent=0"),
        ({"num_sinks": -1}, "num_sinks=-1"),
        ({"score": "max"}, "score='max' is not one of"),
        ({"group": "min"}, "group='min' is not one of"),
        ({"decay": 1}, "between 0 and 1"),
        ({"decay": "x"}, "between 0 and 1"),
        ({"grace": 1.5}, "grace=1.5 must be an integer >= 0"),
        ({"codec": ["int8"]}, r"codec=\['int8'\] is not one of"),
        ({"codec": "int2"}, "codec='int2' is not one of"),
        ({"evict_every": 0}, "evict_every=0"),
        ({"compiled": True, "codec": "int4"}, "codec='int4' does not allow"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        lcpatch.H2OCache(build(), **options)


def test_compiled_takes_no_pattern():
    model = lcpatch.apply(build(), "sink", layers=[1])
    with pytest.raises(ValueError, match="layer 1 follows the pattern 'sink'"):
        lcpatch.H2OCache(model, compiled=True)


def test_a_removed_route_is_noticed():
    model = make_model("h2o")
    cache = lcpatch.H2OCache(model, budget=24)
    model(tokens(1, 30), past_key_values=cache)
    lcpatch.remove(model)
    with pytest.raises(RuntimeError, match="does not ask the cache"):
        model(tokens(1, 1), past_key_values=cache)


def test_peft():
    peft = pytest.importorskip("peft")
    model = build()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = tokens(1, LENGTH)
    budget = model_budget(build(), ids)
    with torch.no_grad():
        want = wrapped(input_ids=ids, use_cache=False).logits
    got = feed(wrapped, ids, lcpatch.H2OCache(wrapped, budget=4096), [50, *[1] * 40])
    assert distance(got, want) <= budget
