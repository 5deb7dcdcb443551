"""Chelsea against its definition, spelt out in float64 with Python's lists: who joins whom, what attention gives."""

import math

import pytest
import torch
from cache_cases import randn, step

from lcpatch.caches.budget import Budget
from lcpatch.caches.cluster import ClusterLayer, Merging

HEADS, KV_HEADS, DIM = 4, 2, 8
SIZES = {"prompt": [70, *[1] * 40], "chunks": [20, 25, 1, 1, 30, *[1] * 20], "tokens": [1] * 60}


class Cluster:
    """Tokens that became one key: the place of the one that the others joined, their mean, and how many they are."""

    def __init__(self, position, key, value, size=1):
        self.position, self.key, self.value, self.size = position, key, value, size


def matched(chunk, merges):
    """One chunk: slots take turns in A and B, every a picks its likest b, and the best edges merge, many to one."""
    a, b = chunk[: len(chunk) // 2 * 2][0::2], chunk[1::2]
    best = []
    for n, one in enumerate(a):
        cosine = [float(one.key @ other.key / (one.key.norm() * other.key.norm())) for other in b]
        best.append((max(cosine), n, cosine.index(max(cosine))))
    joins = {n: m for _, n, m in sorted(best, key=lambda edge: -edge[0])[:merges]}
    out = []
    for n, (one, other) in enumerate(zip(a, b, strict=True)):
        group = [other, *(a[k] for k, m in joins.items() if m == n)]
        size = sum(x.size for x in group)
        key, value = (sum(x.size * getattr(x, name) for x in group) / size for name in ("key", "value"))
        out += [] if n in joins else [one]
        out.append(Cluster(other.position, key, value, size))
    return out + chunk[len(a) * 2 :]


def merged(slots, to, chunk):
    """Down to `to` slots: passes that each keep the same share, at least half; a pass takes from all chunks alike."""
    passes = math.ceil(math.log2(len(slots) / to)) if to < len(slots) else 0
    while len(slots) > to:
        share = (to / len(slots)) ** (1 / passes) if passes else 0
        gives = min(len(slots) - round(len(slots) * share) if passes else len(slots) - to, len(slots) // 2)
        whole, rest = divmod(len(slots), chunk)
        last = max(gives * rest // len(slots), gives - whole * (chunk // 2))
        each, more = divmod(gives - last, whole) if whole else (0, 0)
        parts = [matched(slots[n * chunk : (n + 1) * chunk], each + (n < more)) for n in range(whole)]
        slots = [x for part in [*parts, matched(slots[whole * chunk :], last)] for x in part]
        passes = max(passes - 1, 0)
    return slots


class Definition:
    """One KV head: sinks, centroids, new tokens, recent ones."""

    def __init__(self, budget, chunk):
        self.budget, self.chunk, self.slots, self.centroids = budget, chunk, [], 0

    def attend(self, q, k, v):
        """q [G, T, D]; k, v [T, D] -> [G, T, D]; a slot of n tokens counts n times."""
        past, out = len(self.slots), torch.zeros_like(q)
        first = sum(x.size for x in self.slots)
        self.slots += [Cluster(first + t, k[t], v[t]) for t in range(len(k))]
        for t in range(len(k)):
            seen = self.slots[: past + t + 1]
            keys, values = (torch.stack([getattr(x, name) for x in seen]) for name in ("key", "value"))
            p = torch.tensor([x.size for x in seen]) * (q[:, t] @ keys.T * DIM**-0.5).exp()
            out[:, t] = p @ values / p.sum(-1, keepdim=True)
        return out

    def evict(self, most, target):
        if len(self.slots) <= most:
            return
        sinks, recent = self.budget.protected(most)
        middle, to = self.slots[sinks : len(self.slots) - recent], target - sinks - recent
        old, new = middle[: self.centroids], middle[self.centroids :]
        share = min(max(round(len(new) * to / sum(x.size for x in middle)), 1), len(new))
        kept = max(min(to - share, len(old)), min(len(old), 1))
        if to - kept < 1:
            middle = merged(middle, to, self.chunk)
        else:
            middle = merged(old, kept, self.chunk) + merged(new, to - kept, self.chunk)
        self.slots = [*self.slots[:sinks], *middle, *self.slots[len(self.slots) - recent :]]
        self.centroids = to


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("budget", [Budget(20, 2, 0.25, 1, 1), Budget(16, 1, 5, 4, 1), Budget(0.3, 3, 0.5, None, 1)])
@pytest.mark.parametrize("chunk", [4, 16])
def test_cluster_is_its_definition(sizes, budget, chunk):
    layer = ClusterLayer(budget, Merging(chunk), True, None)
    heads = [Definition(budget, chunk) for _ in range(KV_HEADS)]
    q, k, v = (randn(1, heads, sum(sizes), DIM, seed=n) for n, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    for now in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
        out, _ = step(layer, *now)
        grouped = now[0][0].unflatten(0, (KV_HEADS, -1))
        want = torch.cat([one.attend(*x) for one, *x in zip(heads, grouped, now[1][0], now[2][0], strict=True)])
        assert (out[0] - want).abs().max() <= 1e-6 * want.abs().max()  # the log of a size is fp32
        most, num = layer.budgets[0], now[1].shape[2]
        for one in heads:
            one.evict(most, most if num > 1 else most - budget.slack(most) + 1)
        assert layer.key_positions()[0].tolist() == [[x.position for x in one.slots] for one in heads]
        assert (layer.slots["joined"][0] + 1).tolist() == [[x.size for x in one.slots] for one in heads]
    assert max(x.size for x in heads[0].slots) > 2
