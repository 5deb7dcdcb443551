"""How many tokens a cache may keep, and which of them are never up for choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

MOST_SLACK = 256  # tokens: compacting moves the whole cache, which takes as long as reading it a few times


@dataclass(frozen=True)
class Budget:
    """Tokens per (row, KV head).

    Args:
        tokens: an integer, or a fraction in (0, 1] of the row's real tokens: of those seen up to the last step of
            several tokens (the prompt, its chunks, a later turn's prompt), so it stands still while tokens are
            generated one by one. A row that was never given several at once has no prompt to go by: its fraction is of
            the tokens seen so far (where generating is compiled, of its first alone, with a warning). A recorded step
            that `crop` follows (assisted decoding) leaves it what it was.
        num_sinks: the row's first real tokens, always kept.
        recent: the newest tokens, always kept: how many, or as a float which share of what the sinks leave.
        evict_every: while generating, tokens between two compactions. The row holds at most its budget, on average
            half of this less. Default: a 32nd of the budget, at most 256.
        free: slots that sinks and recent tokens must leave whatever happens: a cache that merges needs one to merge to.

    Raises:
        ValueError: numbers out of range, or a budget that its sinks and recent tokens fill.
    """

    tokens: int | float
    num_sinks: int = 4
    recent: int | float = 0.5
    evict_every: int | None = None
    free: int = 0

    def __post_init__(self) -> None:
        if is_integer(self.tokens):
            ok = self.tokens >= 1
        else:
            ok = isinstance(self.tokens, Real) and not isinstance(self.tokens, bool) and 0 < self.tokens <= 1
        if not ok:
            raise ValueError(
                f"budget={self.tokens!r} must be tokens per KV head (an integer >= 1: 2048) or a share of the row's "
                "tokens (a float in (0, 1]: 0.2)"
            )
        if not is_integer(self.num_sinks) or self.num_sinks < 0:
            raise ValueError(f"num_sinks={self.num_sinks!r} must be an integer >= 0")
        whole = is_integer(self.recent) and self.recent >= 1
        if not whole and not (isinstance(self.recent, float) and 0 < self.recent <= 1):
            raise ValueError(f"recent={self.recent!r} must be tokens (an integer >= 1) or a share in (0, 1]")
        if self.evict_every is not None and (not is_integer(self.evict_every) or self.evict_every < 1):
            raise ValueError(f"evict_every={self.evict_every!r} must be an integer >= 1")
        if is_integer(self.tokens) and self.tokens < self.least:
            raise ValueError(
                f"budget={self.tokens} must hold the {self.num_sinks} sinks and the recent tokens"
                f"{', and a slot beside them' if self.free else ''}: at least {self.least}, or fewer num_sinks, recent"
            )

    @property
    def is_share(self) -> bool:
        return not is_integer(self.tokens)

    @property
    def least(self) -> int:
        """The fewest tokens that any row keeps."""
        return self.num_sinks + (self.recent if is_integer(self.recent) else 1) + self.free

    def of(self, real: int) -> int:
        """The budget of a row of `real` tokens."""
        if is_integer(self.tokens):
            return int(self.tokens)
        # 0.2 * 35 is 7.000000000000001: a share that means a whole number must not be rounded up from it
        return max(math.ceil(self.tokens * real - 1e-9), self.least)

    def protected(self, budget: int) -> tuple[int, int]:
        """`(sinks, recent)` of a row that may keep `budget` tokens."""
        rest = budget - self.num_sinks - self.free
        recent = min(self.recent, rest) if is_integer(self.recent) else max(int(rest * self.recent), 1)
        return self.num_sinks, recent

    def slack(self, budget: int) -> int:
        """Tokens between two compactions of a row that may keep `budget` tokens; never into what is protected."""
        wanted = self.evict_every or max(1, min(budget // 32, MOST_SLACK))
        return max(1, min(wanted, budget - sum(self.protected(budget)) - self.free + 1))


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse an option that is no integer of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}")


def is_integer(x: object) -> bool:
    """Whether it is one, numpy's too; True and False are not."""
    return isinstance(x, Integral) and not isinstance(x, bool)
