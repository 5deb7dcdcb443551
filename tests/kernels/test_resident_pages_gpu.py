"""The fast tier's kernels on a GPU: slots as the reference gives them, and pages decoded to the last bit."""

import pytest
import torch
from resident_cases import SIZES, brought, check_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("slots", "asked", "pages"), [*SIZES, (511, 128, 4096), (4100, 600, 5000)])
def test_the_kernel_gives_the_slots_of_the_reference(slots, asked, pages):
    check_slots(slots, asked, pages, "cuda")


@pytest.mark.parametrize("codec", [None, "int8", "int4", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page", "head_dim"), [(32, 128), (16, 64), (16, 96), (1, 8)])
def test_pages_come_as_the_codec_decodes_them(codec, dtype, page, head_dim):
    assert torch.equal(*brought("triton", codec, dtype, page, head_dim, "cuda"))
