"""A document with what a rank's rows do not see left out: a shorter sequence, in which the same rules hold.

Of the document's positions

    [0 ................ s) [s ........ last query]

the second part is kept as it is; s is a multiple of the rule's period (group and block), so that groups and stripes
fall as before. Of the first part, its far keys (sinks, stripe) are kept one behind the other: every row sees them, so
they become the sinks of the shorter sequence. A rank thus holds its own keys, two periods at most, and each head's
far keys: nothing that grows with the sequence for `shift`, `sf` and `sink`, its share of the stripe (N / stride) for
`s2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

import torch
from torch import Tensor

from lcpatch_kernels import UNBOUNDED, Rule
from lcpatch_kernels.block_sparse.reference import keys_of


@dataclass(frozen=True)
class Shorter:
    """The shorter sequence in which rows [first, last) of a document see what they saw; see the top of this file.

    Args:
        start: s, the position from which on everything is kept.
        num_far: slots for far keys, a multiple of the period.
        length: slots in all; the last one is the last row's.
        rules: of each virtual head, as they hold in the shorter sequence.
        keys: for each virtual head the positions of its keys, and their slots.
    """

    start: int
    num_far: int
    length: int
    rules: list[Rule]
    keys: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, rules: Sequence[Rule], block_size: int, first: int, last: int, length: int) -> Shorter:
        """For rules that differ in nothing but their stripe's residue."""
        rules = [fixed(rule, length) for rule in rules]
        period = lcm(rules[0].group, block_size) if rules[0].stride else rules[0].group
        start = rules[0].lo(first, length) // period * period
        keys = [keys_seen(rule, block_size, first, last, length) for rule in rules]
        most = max(int((k < start).sum()) for k in keys)
        num_far = min(-(-most // period) * period, start)
        if num_far == start:  # nothing to leave out
            return cls(start, start, last, rules, [(k, k) for k in keys])
        shift = start - num_far
        pairs = list(zip(rules, keys, strict=True))
        moved = [_moved(rule, int((k < start).sum()), num_far, shift, block_size) for rule, k in pairs]
        slots = [torch.cat([far, k[k >= start] - shift]) for (_, far), k in zip(moved, keys, strict=True)]
        return cls(start, num_far, last - shift, [rule for rule, _ in moved], list(zip(keys, slots, strict=True)))


def fixed(rule: Rule, length: int) -> Rule:
    """The rule for a document of `length` tokens: a group that is a share of it as a number; dense as dense."""
    if rule.stride == 1 or rule.back >= min(length, UNBOUNDED):
        return Rule()
    group, offset = rule.resolve(length)
    return replace(rule, group=group, shifted=offset > 0)


def _moved(rule: Rule, count: int, num_far: int, shift: int, block_size: int) -> tuple[Rule, Tensor]:
    """The rule after `shift` positions were taken out, and the slots of its `count` far keys: all that it sees there.

    The stripe also falls on some of the `num_far` slots: those of real far keys, so they are never too many. The first
    slots become sinks, as many as make the number right.
    """
    slots = torch.arange(num_far)
    striped = torch.zeros(num_far, dtype=torch.bool)
    if rule.stride:
        rule = replace(rule, residue=(rule.residue - shift // block_size) % rule.stride)
        striped = slots // block_size % rule.stride == rule.residue
    beyond = striped.sum() - striped.cumsum(0) + striped.long()  # striped slots from each slot on
    seen = torch.cat([slots + beyond, torch.tensor([num_far])])  # if the sinks end there
    sinks = int((seen == count).nonzero()[0])
    return replace(rule, sinks=sinks), ((slots < sinks) | striped).nonzero()[:, 0]


@lru_cache(maxsize=256)
def keys_seen(rule: Rule, block_size: int, first: int, last: int, length: int) -> Tensor:
    """Positions, ascending, of what rows [first, last) see."""
    return keys_of(rule, block_size, first, last, length, torch.device("cpu"))
