"""Which blocks of a row a KV head of Sparsely-Sharded attention keeps, and in which pages: whole numbers, no tensors.

Blocks are counted from the row's first real token. Of the blocks 0 … gone - 1, which left the ring, a head keeps the
sinks and its stripe (`s2.py` says why): the first far pages in order, behind the ring's.
"""

from __future__ import annotations

from lcpatch_kernels import BlockSparseSpec, Rule

from ..core.errors import UnsupportedModelError


class KeptBlocks:
    """Of one layer: `size` tokens a block, `ring` pages of a ring, `num_sinks` sink blocks, a rule for each KV head.

    Raises:
        UnsupportedModelError: the spec is not S2's, or not one per KV head, so that no block could be freed.
    """

    def __init__(self, spec: BlockSparseSpec, num_kv_heads: int) -> None:
        self.rules = _one_rule_per_kv_head(spec, num_kv_heads)
        self.size = spec.block_size
        rule = self.rules[0]
        self.ring = rule.back // self.size + 2  # L + 1 pages
        self.num_sinks = rule.sinks // self.size

    def of(self, tokens: int) -> int:
        """The number of the block that holds the last of so many tokens; -1 of none."""
        return (tokens - 1) // self.size

    def left(self, tokens: int, gone: int = 0) -> int:
        """How many blocks have left the ring after so many tokens, if `gone` had before."""
        return max(gone, self.of(tokens) - (self.ring - 1))

    def is_far(self, head: int, block: int) -> bool:
        """Whether a head keeps a block that left the ring."""
        rule = self.rules[head]
        return block < self.num_sinks or (rule.stride > 0 and block % rule.stride == rule.residue)

    def num_far(self, head: int, gone: int) -> int:
        """Far pages of a head once the blocks 0 … gone - 1 have left the ring."""
        rule, sinks = self.rules[head], min(self.num_sinks, gone)
        if not rule.stride:
            return sinks

        def striped(end: int) -> int:
            return (end - rule.residue - 1) // rule.stride + 1 if end > rule.residue else 0

        return sinks + striped(gone) - striped(sinks)

    def most_far(self, gone: int) -> int:
        """The same, the most of a head."""
        return max(self.num_far(head, gone) for head in range(len(self.rules)))

    def pages(self, head: int, gone: int, tokens: int) -> list[int]:
        """The pages that a head's newest of so many tokens reads, its own, which may be partly filled, last."""
        if tokens == 0:
            return []
        far, last = range(self.ring, self.ring + self.num_far(head, gone)), self.of(tokens)
        near = [j for j in range(gone, last) if j > last - (self.ring - 1) or self.is_far(head, j)]
        return [*far, *(j % self.ring for j in near), last % self.ring]

    def rule_over(self, head: int, gone: int) -> Rule:
        """A head's rule over its far blocks and those from `gone` on, as one sequence: the far ones are sinks, and the
        stripe goes on at another residue."""
        rule, num_far = self.rules[head], self.num_far(head, gone)
        sinks = (num_far + max(self.num_sinks - gone, 0)) * self.size
        residue = (rule.residue + num_far - gone) % rule.stride if rule.stride else 0
        return Rule(sinks, rule.stride, residue, rule.group, back=rule.back)


def _one_rule_per_kv_head(spec: BlockSparseSpec, num_kv_heads: int) -> list[Rule]:
    """The rule of each KV head.

    Raises:
        UnsupportedModelError: the spec is not S2's, or not one per KV head, so that no block could be freed.
    """
    packs = spec.packs(num_kv_heads)
    rules = [spec.rules[pack.rule] for pack in packs]
    if len(packs) != num_kv_heads:
        raise UnsupportedModelError(
            "S2Cache: the query heads of a KV head read different blocks, so none can be freed; use share='kv_head'"
        )
    for rule in rules:
        whole = rule.group == spec.block_size and rule.back % spec.block_size == 0 and rule.sinks % spec.block_size == 0
        if not whole or rule.shifted or (rule.back, rule.sinks) != (rules[0].back, rules[0].sinks):
            raise UnsupportedModelError(
                f"S2Cache frees whole blocks of {spec.block_size} tokens, alike in all KV heads; {rule} is not of that "
                "kind (dense heads, sinks='tokens:N' beyond the sink blocks, or another method)"
            )
    return rules
