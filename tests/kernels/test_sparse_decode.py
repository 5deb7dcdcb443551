"""The decode kernel, interpreted on a CPU: every source of keys, every option, lengths that leave parts empty."""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import KINDS, make_spec
from decode_cases import assert_decodes, make_inputs, quantised, results

from lcpatch_kernels import block_sparse, sparse_decode

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter's tests need a machine without a GPU", allow_module_level=True)


def bounds(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "every_block"])
def test_every_kind_of_rule(kind):
    inputs = make_inputs(kind, heads=8, kv_heads=4)
    assert_decodes(inputs)


@pytest.mark.parametrize("kind", ["s2", "mixed", "share"])
def test_reference_is_the_last_row_of_block_sparse(kind):
    inputs = make_inputs(kind, heads=8, kv_heads=4, dtype=torch.float64)
    out, lse = block_sparse(inputs["q"], inputs["k"], inputs["v"], inputs["spec"], impl="sdpa")
    got_out, got_lse, scores = results(inputs, "reference")
    eps = torch.finfo(torch.float64).eps * 203  # a sum of at most 203 terms in another order
    assert (got_out - out).abs().max() <= eps * inputs["v"].abs().max()
    assert (got_lse - lse).abs().max() <= eps * lse.abs().max()
    assert ((scores - got_lse).exp().sum(-1) - 1).abs().max() <= eps


@pytest.mark.parametrize(
    "rows", [((0, 203), (17, 150)), ((3, 4), (5, 5)), ((0, 64), (1, 65)), ((100, 203), (202, 203))]
)
@pytest.mark.parametrize("kind", [None, "s2"])
def test_bounds(kind, rows):
    torch.use_deterministic_algorithms(True)  # new tensors begin as NaN, so scores that nobody writes are seen
    try:
        assert_decodes(make_inputs(kind, bounds=bounds(*rows)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (8, 1)])
def test_groups_of_query_heads(heads, kv_heads):
    assert_decodes(make_inputs("s2", heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_head_dims(head_dim):
    assert_decodes(make_inputs("s2", 90, head_dim=head_dim, batch=1))


@pytest.mark.parametrize("kind", ["s2", None])
def test_bias_softcap_and_scale(kind):
    bias = torch.randn(2, 3, 203)
    assert_decodes(make_inputs(kind, bias=bias, softcap=5.0, scale=0.3))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_slots(page_size):
    pages = 203 // page_size
    rng = torch.Generator().manual_seed(1)
    lists = torch.stack([torch.randperm(pages, generator=rng)[: max(1, pages // 2)] for _ in range(6)])
    slots = lists.view(2, 3, -1).int()
    slots[0, 1, 0] = -1
    most = slots.shape[2] * page_size
    num_keys = torch.tensor([[most, most // 2, 3], [1, 0, most]], dtype=torch.int32)
    assert_decodes(make_inputs(None, slots=slots, page_size=page_size))
    assert_decodes(make_inputs(None, slots=slots, num_keys=num_keys, page_size=page_size, bias=torch.randn(2, 3, 203)))


def test_slots_of_a_pattern_are_the_pattern():
    """The pages that s2 would read, listed out of order, give what s2 gives."""
    spec = make_spec("s2", 6, 3, 16)
    lists = []
    for rule in (spec.rules[spec.head_rules[h]] for h in (0, 2, 4)):
        blocks = [b for b in range(12) if b == 0 or b % 4 == rule.residue or 12 - b <= 2]
        lists.append([16 * b + n for b in reversed(blocks) for n in range(16)] + list(range(192, 203)))
    most = max(map(len, lists))
    slots = torch.tensor([[k + [-1] * (most - len(k)) for k in lists]] * 2, dtype=torch.int32)
    inputs = make_inputs(None, slots=slots)
    assert_decodes(inputs, results(make_inputs("s2"), "reference"))


def test_quantised_keys_and_values():
    """int8; float8 is the GPU's to test, as the interpreter reads it as raw bytes."""
    assert_decodes(quantised(make_inputs("s2"), torch.int8))


def test_a_wrong_stride_is_seen():
    inputs = make_inputs("s2")
    wrong = make_inputs("s2_without_sinks")
    with pytest.raises(AssertionError):
        assert_decodes(inputs, results(wrong, "reference"))


def test_what_does_not_fit_is_refused():
    inputs = make_inputs("s2")
    slots = torch.zeros(2, 3, 4, dtype=torch.int32)
    for change, word in [
        ({"slots": slots}, "not both"),
        ({"num_keys": slots[..., 0]}, "bounds"),
        ({"page_size": 48}, "power of two"),
        ({"k": inputs["k"].to(torch.int8), "v": inputs["v"].to(torch.int8)}, "k_scale"),
        ({"bias": torch.zeros(2, 3, 7)}, "bias must be"),
        ({"impl": "flash"}, "is not one of"),
        ({"q": inputs["q"].repeat(1, 1, 2, 1)}, r"\[B, H, 1, D\]"),
    ]:
        with pytest.raises(ValueError, match=word):
            sparse_decode(**inputs | change)


def test_opcheck():
    op = torch.ops.lcpatch_kernels.flash_attn_sparse_decode.default
    inputs = make_inputs("s2")
    flat = inputs["spec"].to_ints()
    args = (inputs["q"], inputs["k"], inputs["v"], flat, bounds((0, 203), (3, 90)), None, None, 1, None, None, None)
    for scores in (False, True):
        every = (*args, 0.2, 0.0, scores, "reference")
        torch.library.opcheck(op, every, test_utils=("test_schema", "test_faketensor"))
