"""What every pattern is: a frozen dataclass that compiles itself to one rule per query head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar

from lcpatch_kernels import BlockSparseSpec, Rule

from ..core.registry import Registry

patterns: Registry[type[AttentionPattern]] = Registry(
    "attention method",
    package="lcpatch.patterns",
    ambiguous=dict.fromkeys(
        ["s2_attn", "s2attn", "s2-attn", "s2_attention", "s2-attention", "longlora", "shift_attn", "ssa"],
        "'s2' is Sparsely-Sharded attention (arXiv 2407.17678); LongLoRA's shifted sparse attention, which its paper "
        "calls S2-Attn (arXiv 2309.12307), is 'shift'; SinkLoRA's SF-Attn (arXiv 2406.05678) is 'sf'",
    ),
)

MAX_DENOMINATOR = 4096
"""A group's share of the length is the nearest fraction with no larger denominator: kernels take it as two integers."""


@dataclass(frozen=True)
class LayerShape:
    """The layer that a pattern is compiled for.

    Args:
        num_heads: query heads of the layer.
        num_kv_heads: key/value heads; divides `num_heads`.
        rank: how many sparse layers come before this one.
        num_sparse: sparse layers of the whole model.
    """

    num_heads: int
    num_kv_heads: int
    rank: int = 0
    num_sparse: int = 1


@dataclass(frozen=True)
class AttentionPattern(ABC):
    """Base of the methods. A subclass registers itself, declares its options as fields and implements `rules`.

    `paper` is an arXiv id; with `paper_title` and `authors`, as BibTeX writes them, model cards cite it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    paper_title: ClassVar[str] = ""
    authors: ClassVar[str] = ""
    default_mode: ClassVar[str]

    @abstractmethod
    def rules(self, layer: LayerShape) -> Sequence[Rule]:
        """The rule of each query head of `layer`.

        Raises:
            ValueError: options that do not fit the layer's number of heads.
        """

    def spec(self, layer: LayerShape) -> BlockSparseSpec:
        """The rules in the form that the kernels take."""
        return BlockSparseSpec.of(self.rules(layer), getattr(self, "block_size", 64))

    def warnings(self, layer: LayerShape) -> list[str]:
        """What a user should know about this pattern on a model with `layer.num_sparse` such layers."""
        return []

    @property
    def causal(self) -> bool:
        """Whether no row sees a later key."""
        return True

    @property
    def follows_length(self) -> bool:
        """Whether the rules depend on the whole sequence's length, so that they are undefined while it still grows."""
        return False

    def to_options(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> AttentionPattern:
        """Build from `to_options`' form.

        Raises:
            ValueError: an unknown option, or a value that breaks its rule.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(f"{cls.name} has no option {unknown[0]!r}; options: {', '.join(known)}")
        return cls(**options)

    def _require(self, name: str, rule: str, ok: bool) -> None:
        if not ok:
            raise ValueError(f"{self.name}: {name}={getattr(self, name)!r} must be {rule}")


@dataclass(frozen=True)
class GroupedPattern(AttentionPattern):
    """A pattern over groups of consecutive tokens, their size fixed or a share of the sequence.

    Args:
        group_size: tokens per group. Fixed, so it also works while a sequence grows.
        group_ratio: the group as a share of the row's (or packed document's) real length, pads excluded, rounded up.
            Default 1/4 when no `group_size` is given. Training only: a growing sequence has no length yet.
    """

    group_size: int | None = None
    group_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_ratio is not None:
            raise ValueError(
                f"{self.name}: give group_size={self.group_size} or group_ratio={self.group_ratio}, not both"
            )
        if self.group_size is None and self.group_ratio is None:
            object.__setattr__(self, "group_ratio", 0.25)
        if self.group_size is not None:
            self._require("group_size", "a whole number >= 2", _is_int(self.group_size) and self.group_size >= 2)
        else:
            ratio_ok = _is_number(self.group_ratio) and 1 / MAX_DENOMINATOR <= self.group_ratio <= 1
            self._require("group_ratio", f"a number in (0, 1], such as 1/4, and at least 1/{MAX_DENOMINATOR}", ratio_ok)
            object.__setattr__(self, "group_ratio", float(self.group_ratio))

    @property
    def follows_length(self) -> bool:
        return self.group_size is None

    @property
    def group(self) -> int | Fraction:
        """The group as `Rule` takes it."""
        if self.group_size is not None:
            return self.group_size
        return Fraction(self.group_ratio).limit_denominator(MAX_DENOMINATOR)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
