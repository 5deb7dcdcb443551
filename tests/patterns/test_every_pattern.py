"""What every registered method owes: walks the registry, so a new method is tested by being there."""

import inspect
import json
import warnings
from dataclasses import replace

import pytest
import torch
from budget import Problem, assert_within, exact, run
from models import SHORT, TOKENS, build, tokens
from noise import distance, model_budget

import lcpatch
from lcpatch.patterns import AttentionPattern, LayerShape
from lcpatch_kernels import BlockSparseSpec
from lcpatch_kernels.block_sparse import dense

METHODS = tuple(lcpatch.methods())
SHAPES = [LayerShape(9, 3, 1, 4), LayerShape(4, 4), LayerShape(8, 1, 2, 3)]
LENGTHS = (1, 2, 15, 16, 17, TOKENS, 130)

every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}/{s.num_kv_heads}")


def short(method: str, **options) -> AttentionPattern:
    return lcpatch.methods()[method].from_options({**SHORT.get(method, {}), **options})


def mask_of(spec: BlockSparseSpec, length: int, rows: list[int] | None = None) -> torch.Tensor:
    """The dense mask [H, rows, T] of one segment, by the oracle."""
    row = torch.arange(length) if rows is None else torch.tensor(rows)
    h, i, j = torch.meshgrid(torch.arange(spec.num_heads), row, torch.arange(length), indexing="ij")
    return dense.mask_mod(spec, None, length, length, torch.device("cpu"))(torch.zeros_like(h), h, i, j)


def problem(spec: BlockSparseSpec, shape: LayerShape, length: int, head_dim: int = 16) -> Problem:
    torch.manual_seed(length)
    q, do = torch.randn(2, 2, shape.num_heads, length, head_dim).unbind()
    k, v = torch.randn(2, 2, shape.num_kv_heads, length, head_dim).unbind()
    return Problem(spec, 1.5 * q, 1.5 * k, v, do, torch.randn(q.shape[:3]))


@every_method
def test_has_a_title_a_paper_and_a_mode(method: str):
    cls = lcpatch.methods()[method]
    assert cls.title
    assert cls.paper in inspect.getmodule(cls).__doc__  # the source, atop the file
    assert cls.default_mode in ("train", "always", "never")


@every_method
@every_shape
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_causal_and_never_empty(method: str, shape: LayerShape, length: int):
    mask = mask_of(short(method).spec(shape), length)
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()  # every token sees itself


@every_method
@every_shape
@pytest.mark.parametrize("length", LENGTHS)
def test_density_is_the_share_of_kept_pairs(method: str, shape: LayerShape, length: int):
    spec = short(method).spec(shape)
    causal = length * (length + 1) // 2
    assert spec.density(length) == pytest.approx(int(mask_of(spec, length).sum()) / (shape.num_heads * causal))


@every_method
def test_short_options_are_sparse(method: str):
    """Else what follows would test dense attention."""
    assert short(method).spec(LayerShape(4, 2)).density(TOKENS) < 0.9


@every_method
@every_shape
@pytest.mark.parametrize("length", [1, 17, TOKENS, 130])
def test_results_and_gradients(method: str, shape: LayerShape, length: int):
    """out, lse, dq, dk and dv of the tiled reference against the dense oracle."""
    case = problem(short(method).spec(shape), shape, length)
    assert_within(run(case, "reference"), case)


@every_method
def test_negative_control(method: str):
    """The comparison above sees one head whose rows reach one key too far."""
    shape = LayerShape(4, 2)
    case = problem(short(method).spec(shape), shape, TOKENS)
    rules = [case.spec.rules[r] for r in case.spec.head_rules]
    rules[1] = replace(rules[1], back=rules[1].back + 1)
    changed = BlockSparseSpec.of(rules, case.spec.block_size)
    difference = (mask_of(changed, TOKENS) != mask_of(case.spec, TOKENS)).sum(dim=(1, 2)).tolist()
    assert difference[1] > 0
    assert sum(difference) == difference[1]
    with pytest.raises(AssertionError, match="budget"):
        assert_within(run(case, "reference", changed), case, exact(case))


@every_method
def test_options_round_trip(method: str):
    cls = lcpatch.methods()[method]
    for pattern in (cls(), short(method)):
        assert cls.from_options(json.loads(json.dumps(pattern.to_options()))) == pattern
        assert hash(pattern) == hash(cls.from_options(pattern.to_options()))
    with pytest.raises(ValueError, match=rf"{method} has no option 'strid'; options: "):
        cls.from_options({"strid": 3})


@every_method
@every_shape
def test_spec_round_trip(method: str, shape: LayerShape):
    """Through the integers that cross a `torch.library` schema."""
    spec = short(method).spec(shape)
    assert BlockSparseSpec.from_ints(spec.to_ints()) == spec
    assert all(isinstance(n, int) for n in spec.to_ints())


@every_method
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_token_sees_a_later_one(method: str, family: str):
    """Change token t: no logit before t moves, to the bit; token t's own does."""
    model = lcpatch.apply(build(family), method, mode="always", **SHORT.get(method, {}))
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits[0]
        for t in (1, 15, 16, 40, TOKENS - 1):
            changed = ids.clone()
            changed[0, t] = changed[0, t] % 57 + 3 + 1  # another token, no special one
            after = model(changed).logits[0]
            assert torch.equal(after[:t], before[:t]), t
            assert not torch.equal(after[t], before[t]), t


@every_method
def test_apply_and_remove(method: str):
    model, ids = build(), tokens(2)
    before = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two layers do not cover every block of the default stride
        assert lcpatch.apply(model, method) is model
    assert model.config.lcpatch == json.loads(json.dumps(model.config.lcpatch))
    assert model.config.lcpatch["method"] == method
    assert lcpatch.remove(model) is model
    assert torch.equal(model(ids).logits, before)


@every_method
def test_the_saved_patch_patches_the_same(method: str):
    """`config.lcpatch` is all that is needed to patch another copy of the model."""
    model, ids = lcpatch.apply(build(), method, mode="always", sinks="tokens:2", **SHORT.get(method, {})), tokens(2)
    other = lcpatch.apply(build(), json.loads(json.dumps(model.config.lcpatch)))
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert other.config.lcpatch == model.config.lcpatch


@every_method
@pytest.mark.parametrize("impl", ["sdpa", "flex"])
def test_implementations_agree(method: str, impl: str):
    model, ids = build(num_attention_heads=4, num_key_value_heads=2, hidden_size=32), tokens(2)
    allowed = model_budget(model, ids)
    settings = {"mode": "always", **SHORT.get(method, {})}
    with torch.no_grad():
        want = lcpatch.apply(model, method, impl="reference", **settings)(ids).logits
        assert distance(lcpatch.apply(model, method, impl=impl, **settings)(ids).logits, want) <= allowed
