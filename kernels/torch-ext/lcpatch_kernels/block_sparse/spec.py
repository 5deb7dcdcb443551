"""What each query head may attend to, as a few integers: the only thing a block-sparse kernel knows of a pattern.

Positions i (query) and j (key) count from the first token of their segment. A row (i) of a head sees key j iff

    j <= i  and  ( j >= lo(i)  or  j < sinks  or  (j // block_size) mod stride == residue )
    lo(i) = max(0, (i + offset) // group * group - offset - back)

so the keys of a row are one contiguous interval that ends at the diagonal, a sink range at the front and a stripe of
blocks in between. Windows (group 1), local blocks (group = block), shifted groups and dense rows (back unbounded) are
all one rule. Nothing here grows with the sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

UNBOUNDED = 1 << 30
"""A `back` that reaches the first token of any sequence: the row is dense. No number of a rule may be larger."""

MAX_BLOCK_SIZE = 1 << 12
"""Implementations hold tiles of a block's size."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton's own takes 15 µs of a launch's time, 15 times over."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Rule:
    """The keys that one query head may attend to.

    Args:
        sinks: tokens at the start of the segment that every later row sees.
        stride: distance of the stripe's blocks, in blocks; 0 for no stripe, 1 for every block (dense).
        residue: the stripe holds the blocks j with j mod stride == residue.
        group: granularity of `lo`, in tokens; a `Fraction` is a share of the segment's length, rounded up.
        shifted: group boundaries move back by group // 2 (offset = group - group // 2 instead of 0).
        back: how many tokens before its group's start a row still sees.
        cyclic: LongLoRA's rolled groups. Row i sees j iff r(i) // group == r(j) // group and r(j) <= r(i), where
            r(i) = (i - shift) mod length and shift is group // 2 if `shifted`, else 0. Not causal, not an interval:
            only the dense and flex implementations run it.
    """

    sinks: int = 0
    stride: int = 0
    residue: int = 0
    group: int | Fraction = 1
    shifted: bool = False
    back: int = UNBOUNDED
    cyclic: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.stride < 0 or self.back < 0 or self.group <= 0:
            raise ValueError(f"{self}: sinks, stride and back must be >= 0 and group must be > 0")
        if max(self.sinks, self.stride, self.back, self.group) > UNBOUNDED:
            raise ValueError(f"{self}: sinks, stride, back and group must be at most {UNBOUNDED}")
        if self.stride and not 0 <= self.residue < self.stride:
            raise ValueError(f"residue={self.residue} must lie in [0, stride={self.stride})")
        if isinstance(self.group, Fraction) and self.group > 1:
            raise ValueError(f"group={self.group} is a share of the length and must be <= 1")

    def resolve(self, length: int) -> tuple[int, int]:
        """`(group, offset)` in tokens for a segment of `length` tokens.

        A group that a share makes as long as its segment is not shifted: it would only cut the segment in two.
        """
        if not isinstance(self.group, Fraction):
            return self.group, self.group - self.group // 2 if self.shifted else 0
        group = max(1, -(-length * self.group.numerator // self.group.denominator))
        return group, group - group // 2 if self.shifted and group < length else 0

    def lo(self, i: int, length: int) -> int:
        """First key of row `i`'s interval."""
        group, offset = self.resolve(length)
        return max(0, (i + offset) // group * group - offset - self.back)

    def to_ints(self) -> list[int]:
        """The fields, `group` as numerator and denominator (0 for a plain integer)."""
        share = isinstance(self.group, Fraction)
        num, den = (self.group.numerator, self.group.denominator) if share else (self.group, 0)
        return [self.sinks, self.stride, self.residue, num, den, int(self.shifted), self.back, int(self.cyclic)]


DENSE = Rule()
_NUM_FIELDS = len(DENSE.to_ints())


@dataclass(frozen=True, slots=True)
class Pack:
    """Consecutive query heads with one rule and one KV head: they share a tile, so K and V are read once for all."""

    rule: int
    kv_head: int
    first_head: int
    num_heads: int


@dataclass(frozen=True)
class BlockSparseSpec:
    """One layer's attention pattern: the distinct rules, and which of them each query head follows.

    Args:
        block_size: tokens per block of every stripe; a power of two, at least 16.
        rules: the distinct rules.
        head_rules: for each query head the index of its rule.
    """

    block_size: int
    rules: tuple[Rule, ...]
    head_rules: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 16 <= self.block_size <= MAX_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise ValueError(
                f"block_size={self.block_size} must be a power of two from 16 to {MAX_BLOCK_SIZE}: 16, 32, 64, 128, …"
            )
        if any(rule.stride * self.block_size > UNBOUNDED for rule in self.rules):
            raise ValueError(f"a stripe's period, stride * block_size, must be at most {UNBOUNDED} tokens")
        if not self.head_rules:
            raise ValueError("a spec needs at least one query head")
        if not all(0 <= r < len(self.rules) for r in self.head_rules):
            raise ValueError(f"head_rules={self.head_rules} must index the {len(self.rules)} rules")
        # Every call of the op asks for these; computed each time they took longer than a kernel at 8K tokens.
        ints = [self.block_size, len(self.rules), *(n for rule in self.rules for n in rule.to_ints()), *self.head_rules]
        object.__setattr__(self, "_ints", tuple(ints))
        object.__setattr__(self, "_hash", hash(self._ints))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, rules: Sequence[Rule], block_size: int = 64) -> BlockSparseSpec:
        """The spec in which query head h follows `rules[h]`."""
        distinct = tuple(dict.fromkeys(rules))
        return cls(block_size, distinct, tuple(distinct.index(r) for r in rules))

    @property
    def num_heads(self) -> int:
        return len(self.head_rules)

    @property
    def has_ratio(self) -> bool:
        """Whether some group is a share of the segment's length."""
        return any(isinstance(r.group, Fraction) for r in self.rules)

    @property
    def is_cyclic(self) -> bool:
        return any(r.cyclic for r in self.rules)

    def packs(self, num_kv_heads: int, max_heads: int | None = None) -> tuple[Pack, ...]:
        """Runs of query heads that share rule and KV head, at most `max_heads` long."""
        return _packs(self, num_kv_heads, max_heads)

    def density(self, length: int) -> float:
        """Attended pairs of one segment of `length` tokens over its causal pairs, mean over heads; O(length) time."""
        pairs = [_num_pairs(rule, self.block_size, length) for rule in self.rules]
        causal = length * (length + 1) // 2
        return sum(pairs[r] for r in self.head_rules) / (self.num_heads * causal)

    def num_pairs(self, first: int, last: int, length: int) -> int:
        """Attended pairs of rows [first, last) of a segment of `length` tokens, over all query heads."""
        if self.is_cyclic and (first, last) != (0, length):
            raise ValueError("rows of rolled groups are not counted apart; give first=0 and last=length")
        pairs = [_num_pairs(rule, self.block_size, length, first, last) for rule in self.rules]
        return sum(pairs[r] for r in self.head_rules)

    def to_ints(self) -> list[int]:
        """Flat encoding: the form in which a spec crosses a `torch.library` schema."""
        return list(self._ints)

    @staticmethod
    def from_ints(flat: Sequence[int]) -> BlockSparseSpec:
        """Inverse of `to_ints`."""
        return _from_ints(tuple(flat))


@lru_cache(maxsize=256)
def _from_ints(flat: tuple[int, ...]) -> BlockSparseSpec:
    block_size, num_rules, *rest = flat
    rules = []
    for n in range(num_rules):
        sinks, stride, residue, num, den, shifted, back, cyclic = rest[n * _NUM_FIELDS : (n + 1) * _NUM_FIELDS]
        group = Fraction(num, den) if den else num
        rules.append(Rule(sinks, stride, residue, group, bool(shifted), back, bool(cyclic)))
    return BlockSparseSpec(block_size, tuple(rules), tuple(rest[num_rules * _NUM_FIELDS :]))


@lru_cache(maxsize=256)
def _packs(spec: BlockSparseSpec, num_kv_heads: int, max_heads: int | None) -> tuple[Pack, ...]:
    if num_kv_heads < 1 or spec.num_heads % num_kv_heads:
        raise ValueError(f"{spec.num_heads} query heads cannot be grouped over {num_kv_heads} KV heads")
    group = spec.num_heads // num_kv_heads
    packs: list[Pack] = []
    for head, rule in enumerate(spec.head_rules):
        last = packs[-1] if packs else None
        same = last is not None and (last.rule, last.kv_head) == (rule, head // group)
        if same and (max_heads is None or last.num_heads < max_heads):
            packs[-1] = Pack(rule, last.kv_head, last.first_head, last.num_heads + 1)
        else:
            packs.append(Pack(rule, head // group, head, 1))
    return tuple(packs)


@lru_cache(maxsize=1 << 15)  # a number each; of a stripe there is one a residue and document, of a packed row thousands
def _num_pairs(rule: Rule, block_size: int, length: int, first: int = 0, last: int | None = None) -> int:
    """Number of (i, j) pairs that `rule` keeps in rows [first, last) of a segment of `length` tokens."""
    if rule.cyclic:
        group, _ = rule.resolve(length)
        sizes = [min(group, length - start) for start in range(0, length, group)]
        return sum(n * (n + 1) // 2 for n in sizes)
    i = torch.arange(first, length if last is None else last)
    group, offset = rule.resolve(length)
    lo = ((i + offset) // group * group - offset - rule.back).clamp(min=0)
    sinks = lo.clamp(max=rule.sinks)
    pairs = i - lo + 1 + sinks
    if rule.stride:
        pairs += _striped(lo, rule, block_size) - _striped(sinks, rule, block_size)
    return int(pairs.sum())


def _striped(end: torch.Tensor, rule: Rule, block_size: int) -> torch.Tensor:
    """Keys j < end that lie in the stripe."""
    period, start = rule.stride * block_size, rule.residue * block_size
    return end // period * block_size + (end % period - start).clamp(0, block_size)
