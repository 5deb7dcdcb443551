"""torch's own ring of context parallelism, as a peer: over FlashAttention-2, head and tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def torchs_ring(whole: list[Tensor], num_ranks: int) -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Causal attention of q, k, v over `num_ranks` processes, and this rank's parts [B, H, T / P, D] of `whole`.

    `whole` has to hold q, k and v of as many heads, [B, H, T, D]; T must be a multiple of 2 P.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    parts = [x.clone(memory_format=torch.contiguous_format) for x in whole]  # become the parts in place
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        context_parallel(
            init_device_mesh("cuda", (num_ranks,)),
            buffers=parts,
            buffer_seq_dims=[2] * len(parts),
            no_restore_buffers=set(parts),
        ),
    ):
        # Looked up when it is called: the context replaces the function in its module, and a name that was imported
        # before attends to the rank's own keys alone.
        yield lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), parts
