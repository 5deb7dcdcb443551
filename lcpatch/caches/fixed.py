"""Generating with tensors that never move: a step that compiles, and that a CUDA graph can replay.

Within such a step a token is only appended. What else it asks for is done as always, after the same steps, but outside
of the compiled one: while the next is prepared, or once someone asks what is kept. What changes from step to step lies
in tensors, what the host knows stays as it is. `fixed_slots` and `fixed_pages` say what that is for slots and pages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.layers import state_of
from ..hf.watch import Call
from .layer import HALF_WAY, inference_mode_if
from .scattered import is_dense


def still(*tensors: Tensor) -> None:
    """Say of tensors that they stay where they are, and as large, so that a graph need not copy what it reads there."""
    for x in tensors:
        torch._dynamo.mark_static_address(x)
        torch._dynamo.mark_static(x)


def check_layer(index: int, module: nn.Module) -> None:
    """Refuse a layer that attends by a pattern.

    Raises:
        ValueError: it does.
    """
    state = state_of(module)
    if state is not None and state.spec is not None:
        raise ValueError(f"compiled=True: layer {index} follows the pattern {state.method!r}; leave it out")


class Steps:
    """How far the layers of one device are: two tensors for all of them.

    The first layer counts on the one, the last on the other, so that a step which failed between them shows.

    A tensor that a step reads costs it a guard and an input, one that it changes a kernel too.

    `most` is what the host knows without asking the device: no more tokens than that were seen. Every step is
    announced, some twice, so announcements bound them.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.span = torch.zeros(rows, 2, dtype=torch.int32, device=device)  # each row's slots; all end together
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.shared: dict[Any, Any] = {}  # what else layers have in common
        self._taken: int | None = None  # tokens since `begin`, once asked for
        still(self.span, self.seen)

    def begin(self, seen: int, counts: list[int]) -> None:
        """`seen` tokens so far, of which the rows keep `counts`."""
        self._taken = None
        length = max(counts)
        self.span.copy_(torch.tensor([[length - count, length] for count in counts]))
        self.seen.fill_(seen)
        self.most = seen

    def recount(self) -> None:
        """Let `most` be what was really seen; waits for the device."""
        self.most = int(self.seen)

    def taken(self, seen: int, counts: list[int]) -> int:
        """Tokens since `begin` was told this; waits for the device, once for all layers: who goes on begins again.

        Raises:
            RuntimeError: not all layers have the newest one.
        """
        if self._taken is None:
            filled, now = torch.stack([self.span[0, 1].long(), self.seen]).tolist()
            if filled - max(counts) != now - seen:
                raise RuntimeError(HALF_WAY)
            self._taken = now - seen
        return self._taken

    def last(self) -> Tensor:
        """[1], the slot of the newest token."""
        return self.span[:1, 1] - 1


def get_ready(layers: Iterable[Any], steps: dict[torch.device, Steps], check: Callable[[], None]) -> None:
    """Let layers that can be compiled take a single token next; outside of the compiled step.

    All or none of them enter: one that went alone would count apart from the others. The device is waited for only
    where there may be no room for another token.

    Args:
        layers: of a cache.
        steps: of their devices, kept for the next time.
        check: whether all layers of the cache have the same tokens; before any enters, which then counts elsewhere.

    Raises:
        ValueError: layers that keep different numbers of tokens, from a file that no cache wrote.
    """
    fixed = [layer for layer in layers if isinstance(layer, FixedLayer) and layer.is_compileable]
    running = {id(layer.steps): layer.steps for layer in fixed if layer.steps is not None}.values()
    for each in running:
        each.most += 1
    if all(layer.has_room() for layer in fixed):
        return
    for each in running:
        each.recount()
    if all(layer.has_room() for layer in fixed):
        return
    for layer in fixed:
        layer.leave_fixed()
    check()
    for layer in fixed:
        layer.keep_last_step()
    if not all(layer.can_enter() for layer in fixed):
        return
    first: dict[torch.device, FixedLayer] = {}
    last = {layer.device: layer for layer in fixed}
    for layer in fixed:
        leader = first.setdefault(layer.device, layer)
        if (layer.seen, layer.counts) != (leader.seen, leader.counts):
            raise ValueError(f"{layer.owner}: layers keep {layer.counts} and {leader.counts} tokens; begin a new cache")
        if leader is layer:
            if layer.device not in steps or len(steps[layer.device].span) != len(layer.pads):
                steps[layer.device] = Steps(len(layer.pads), layer.device)
            steps[layer.device].begin(layer.seen, layer.counts)
        layer.enter_fixed(steps[layer.device], leader is layer, last[layer.device] is layer)


class FixedLayer:
    """A layer that may generate in tensors which never move: what `get_ready` asks of it.

    It has `seen`, `pads`, `counts` (tokens kept, per row), `budgets` and `online`, and hears in `keep_last_step` that a
    token follows the last step.

    Args:
        args: of the layer that it is without.
        fixed: whether it ever does.
    """

    steps: Steps | None = None  # while it generates: its `counts` and `seen` are of when that began
    leads = ends = False  # whether it counts the tokens that begin, for the others too; those that all layers have
    unit = "tokens"  # of its budgets
    _inference = False  # it entered under torch.inference_mode
    _until = 0  # tokens seen when it must leave

    def __init__(self, *args: Any, fixed: bool = False) -> None:
        self.is_compileable = fixed
        super().__init__(*args)

    def _clear(self) -> None:
        super()._clear()
        self.steps = None

    def can_trace(self, num: int) -> bool:
        return self.steps is not None and num == 1

    def has_room(self) -> bool:
        """Whether it generates, and may surely append another token."""
        return self.steps is not None and self.steps.most < self._until

    def can_enter(self) -> bool:
        """Whether it may generate so."""
        raise NotImplementedError

    def enter_fixed(self, steps: Steps, leads: bool, ends: bool) -> None:
        """Lay out what the next tokens need, so that a step only writes keys and values.

        Args:
            steps: begun at what is kept now.
            leads, ends: whether this layer is their first, their last.
        """
        self._inference = torch.is_inference_mode_enabled()
        self._stand_still()
        self._lay_out(steps)
        self.steps, self.leads, self.ends = steps, leads, ends

    def leave_fixed(self) -> None:
        """Know again on the host what is kept.

        Raises:
            RuntimeError: a step failed half-way.
        """
        if self.steps is None:
            return
        taken = self.steps.taken(self.seen, self.counts)
        self.steps = None
        self.seen += taken
        with inference_mode_if(self._inference):
            self._take_back(taken)

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """As it does otherwise; in tensors that stay where they are if it has entered them."""
        steps = self.steps
        if steps is None or call.query.shape[2] > 1 or not is_dense(call.spec):
            self.leave_fixed()
            return super()._attend(call)
        new, self._new = self._new, None
        if self.leads:
            steps.span[:, 1].add_(1)
        answer = self._fixed_step(call, *new)
        if self.ends:
            steps.seen.add_(1)
        return answer

    def _fixed_step(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row: store it, and attend."""
        raise NotImplementedError

    def _lay_out(self, steps: Steps) -> None:
        """The part of entering that is the layer's own; says `_until` when there is room."""
        raise NotImplementedError

    def _take_back(self, taken: int) -> None:
        """The part of leaving that is the layer's own, after so many tokens, which `seen` counts by now."""
        raise NotImplementedError

    def _stand_still(self) -> None:
        """Buffers of one size take no budget that grows with the text."""
        if any(self.online):
            rows = {row: self.budgets[row] for row, on in enumerate(self.online) if on}
            warnings.warn(
                f"{self.owner}, compiled=True: without a prompt of several tokens a share stays what it is after the "
                f"first (row: {self.unit} kept {rows}); give an integer budget, or a prompt",
                stacklevel=2,
            )
            self.online = [False] * len(self.online)

    def get_seq_length(self) -> int:
        if self.steps is None:
            return self.seen
        return self.steps.seen if torch.compiler.is_compiling() else int(self.steps.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.steps is not None and query_length == 1:
            return 0, 0  # nothing to mask: what is filled, the step knows
        return self.get_seq_length() + query_length, 0

    # Whoever asks or changes what is kept.

    def crop(self, tokens_to_remove: int) -> None:
        self.leave_fixed()
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.leave_fixed()
        super().batch_select_indices(indices)

    def kept_of_rows(self) -> list[tuple[int, int]]:
        self.leave_fixed()
        return super().kept_of_rows()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.leave_fixed()
        return super().state()
