"""A bias on the keys of `block_sparse`: the reference, and the kernel interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch
from bias_cases import assert_biased, make_inputs, oracle

from lcpatch_kernels import block_sparse

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter's tests need a machine without a GPU", allow_module_level=True)

BOUNDS = {
    "padded": [[[0, 40, 0, 131]], [[7, 40, 30, 131]]],
    "apart": [[[0, 40, 0, 91, 40]], [[7, 40, 30, 91, 40]]],  # all keys lie before all queries
}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["dense", "s2", "window"])
def test_a_chunk_over_a_past(kind, impl):
    assert_biased(make_inputs(kind, 40, 131), impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("rows", [None, *BOUNDS])
def test_bounds_softcap_and_scale(rows, impl):
    bounds = None if rows is None else torch.tensor(BOUNDS[rows], dtype=torch.int32)
    assert_biased(make_inputs("dense", 40, 131, bounds=bounds, softcap=6.0, scale=0.3), impl)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_a_bias_that_is_far_from_zero(shift):
    """The sums of the fast loop would under- or overflow: all keys, or all but a row's own."""
    inputs = make_inputs("dense", 40, 131)
    inputs["bias"] = inputs["bias"] + shift
    assert_biased(inputs, "triton")
    inputs["bias"][:, :, -40:] -= shift
    assert_biased(inputs, "triton")


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 16), (4, 4, 80), (8, 1, 64)])
def test_groups_and_head_dims(heads, kv_heads, head_dim):
    assert_biased(make_inputs("dense", 33, 70, heads=heads, kv_heads=kv_heads, head_dim=head_dim), "triton")


def test_a_wrong_bias_is_seen():
    inputs = make_inputs("dense", 40, 131)
    wrong = inputs | {"bias": inputs["bias"].roll(1, 2)}
    with pytest.raises(AssertionError):
        assert_biased(inputs, "triton", oracle(wrong))


def test_what_does_not_fit_is_refused():
    inputs = make_inputs("dense", 40, 131)
    for change, word in [
        ({"bias": inputs["bias"][:, :, :-1]}, "bias must be"),
        ({"bias": inputs["bias"].double()}, "bias must be"),
        ({"impl": "sdpa"}, "takes no bias"),
    ]:
        with pytest.raises(ValueError, match=word):
            block_sparse(**inputs | change)


def test_opcheck():
    op = torch.ops.lcpatch_kernels.flash_attn_block_sparse_biased.default
    inputs = make_inputs("dense", 5, 9)
    q, k, v, spec, bias = inputs.values()
    args = (q, k, v, None, bias, spec.to_ints(), 0.2, 0.0, "reference")
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
