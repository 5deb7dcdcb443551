"""ulysses: each rank gets whole rows of some heads, attends as one GPU would, and gives each rank its tokens back.

Source: "DeepSpeed Ulysses", arXiv 2309.14509. A rank computes the query heads [r H / P, (r + 1) H / P), each under the
rule of its number in the whole layer; so it runs any pattern, rolled groups too, and any layout. Where there are more
ranks than KV heads, several get the same one. Nothing overlaps, and a rank holds whole rows of its heads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lcpatch_kernels import BlockSparseSpec, block_sparse

from ...hf.watch import Call
from .layout import Layout, Shard
from .link import Link
from .strategy import Strategy, Volume, Work, bounds_tensor, flat, strategies, take


@strategies.register("ulysses")
class Ulysses(Strategy):
    """Heads for tokens, and back."""

    def problem(self, work: Work) -> str | None:
        ranks, heads, kv_heads = work.layout.num_ranks, work.num_heads, work.num_kv_heads
        if work.layout.name == "chunks":
            return "it brings whole rows together, of which chunks leave only a part at a time"
        if heads % ranks:
            return f"{ranks} ranks cannot share {heads} query heads evenly"
        if kv_heads % ranks and ranks % kv_heads:
            return f"{ranks} ranks cannot share {kv_heads} KV heads evenly: one must divide the other"
        return None

    def attend(self, call: Call, shard: Shard, link: Link) -> tuple[Tensor, Tensor]:
        work = Work.of(call, shard)
        if problem := self.problem(work):
            raise ValueError(f"ulysses: {problem}")
        batch, heads, _, dim = call.query.shape
        ranks, h, kv = link.size, heads // link.size, _kv_share(work)
        where = (shard.layout, shard.rank, batch, heads, work.num_kv_heads, str(call.query.device))
        send, places, home = _indices(*where)
        tokens = [shard.layout.num_tokens(r) for r in range(ranks)]
        lines = batch * (h + 2 * kv)
        table = torch.cat([flat(x) for x in (call.query, call.key, call.value)])
        whole = link.exchange(take(table, send), [lines * tokens[shard.rank]] * ranks, [lines * n for n in tokens])()
        q, k, v = take(whole, places).split([h, kv, kv], 1)
        first = shard.rank * h
        spec = BlockSparseSpec(work.spec.block_size, work.spec.rules, work.spec.head_rules[first : first + h])
        bounds = bounds_tensor([[(*d, *d) for d in row] for row in shard.documents], 4, q.device)
        out, lse = block_sparse(q, k, v, spec, bounds=bounds, scale=call.scale, softcap=call.softcap, impl=call.impl)
        counts = [batch * h * n for n in tokens], [batch * h * tokens[shard.rank]] * ranks
        arriving = [link.exchange(take(x, home), *counts) for x in (flat(out), lse.reshape(-1))]
        out, lse = (arrive() for arrive in arriving)
        shape = (ranks, batch, h, tokens[shard.rank])
        out = out.view(*shape, dim).transpose(0, 1).flatten(1, 2)
        return out, lse.view(shape).transpose(0, 1).flatten(1, 2)

    def volume(self, work: Work) -> Volume:
        ranks, rows = work.layout.num_ranks, len(work.documents)
        h = work.num_heads // ranks
        width = work.head_dim * work.itemsize
        forward, backward = [], []
        for rank in range(ranks):
            mine = work.layout.num_tokens(rank)
            inputs = rows * (h + 2 * _kv_share(work)) * width, rows * h * (width + work.lse_size)
            away, theirs = (ranks - 1) * mine, work.layout.length - mine
            forward.append(inputs[0] * away + inputs[1] * theirs)
            backward.append(inputs[1] * away + inputs[0] * theirs)
        return Volume(tuple(forward), tuple(backward))


def _kv_share(work: Work) -> int:
    return max(1, work.num_kv_heads // work.layout.num_ranks)


# An entry is as large as the layer's own q, k and v: 32 MiB for 128K tokens on four ranks. So those of batches that
# are gone do not stay on the device; a batch's layers, which differ in heads at most, ask for the same.
@lru_cache(maxsize=4)
def _indices(
    layout: Layout, rank: int, batch: int, heads: int, kv_heads: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What to send (of q, k and v, flat), where each whole row's token arrives [B, h + 2 kv, N], what to send back."""
    ranks, mine = layout.num_ranks, layout.num_tokens(rank)
    h, kv = heads // ranks, max(1, kv_heads // ranks)
    local = torch.arange(mine)
    row = torch.arange(batch)[:, None, None]
    send = []
    for r in range(ranks):
        q_heads = torch.arange(r * h, (r + 1) * h)[:, None]
        k_heads = torch.arange(kv)[:, None] + r * h * kv_heads // heads
        k_rows = batch * heads * mine + (row * kv_heads + k_heads) * mine + local
        v_rows = k_rows + batch * kv_heads * mine
        # A line (batch row, head) after the other: for each batch row the query heads, then k's, then v's.
        send.append(torch.cat([(row * heads + q_heads) * mine + local, k_rows, v_rows], 1).flatten())
    tokens = torch.tensor([layout.num_tokens(r) for r in range(ranks)])
    lines = h + 2 * kv
    base = (tokens.cumsum(0) - tokens) * batch * lines
    owner, at = layout.locate(torch.arange(layout.length))
    line = row * lines + torch.arange(lines)[:, None]
    places = base[owner] + line * tokens[owner] + at
    home = [((row * h + torch.arange(h)[:, None]) * layout.length + layout.tokens(r)).flatten() for r in range(ranks)]
    return torch.cat(send).to(device), places.to(device), torch.cat(home).to(device)
