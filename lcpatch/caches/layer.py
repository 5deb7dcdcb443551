"""A layer whose storage is not simply every token in order: it also attends.

`hf.attention` hands it the queries and the pattern (`attend`), and it answers with the output and the LSE. It is never
asked what it keeps, and no one else indexes into it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lcpatch_kernels import sparse_decode

from ..core.errors import UnsupportedModelError
from ..hf.watch import Call

HALF_WAY = (
    "an earlier forward failed half-way, so some layers have its tokens and some have not: cache.reset() and read the "
    "text again, or load a saved cache"
)


class AttendingLayer(DynamicLayer):
    """A layer that computes attention over what it keeps, which is not simply every token in order.

    It takes new keys and values when transformers hands them over (`update`) and stores them when their queries attend.
    Positions and masks stay those of the whole sequence, so a model's position ids and padding are right whatever is
    freed; each row's pads are learnt where the row begins.

    A subclass implements `_attend` (`_begin` first), `crop`, `batch_select_indices`, `memory`, and adds to `_clear` and
    `lazy_initialization`.
    """

    is_croppable = True
    expected = False
    owner: ClassVar[str] = "this cache"  # in messages
    again: ClassVar[str] = "and not once lcpatch.remove(model) was called: make a new cache"

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # tokens, pads included
        self.pads: list[int] = []  # per row: pads before its first token
        self._new: tuple[Tensor, Tensor] | None = None  # keys and values of a step whose attention has not come yet
        self.midway = False
        self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pads = [0] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, K, T, D]; they are stored when their queries attend."""
        if self.is_midway():
            raise RuntimeError(f"{self.owner}: {HALF_WAY}")
        if not self.expected:
            raise RuntimeError(
                f"{self.owner}: this model's attention does not ask the cache; it works only with the model it was "
                f"made for, {self.again}"
            )
        self.expected = False
        if key_states.is_meta:
            raise UnsupportedModelError(
                f"{self.owner}: a model on the meta device has no keys and values to keep; load its weights first"
            )
        if torch.is_autocast_enabled(key_states.device.type):  # rotary embeddings leave keys in fp32 beside the values
            key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != len(self.pads):
            raise ValueError(
                f"{self.owner} holds {len(self.pads)} rows, the step has {key_states.shape[0]}: for another batch call "
                "cache.reset(), for beams or samples of each row cache.batch_repeat_interleave(n)"
            )
        self._new = (key_states, value_states)
        return self._new

    def can_trace(self, num: int) -> bool:
        return False

    def is_midway(self) -> bool:
        """Whether it took tokens whose queries have not attended yet."""
        return self._new is not None or self.midway

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.pads)).repeat_interleave(repeats))

    def wants_dense(self, query: Tensor) -> bool:
        return True  # what the dense implementation needs may be gone

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries; see `hf.watch.Call`.

        Also under autocast in the dtypes of what it is given, as kernels compute: else plain torch would round the sums
        that say what is kept or read.
        """
        kind = call.query.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return self._attend(call)

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """The same, where autocast is off."""
        raise NotImplementedError

    def _begin(self, call: Call) -> tuple[Tensor, Tensor]:
        """The step's new keys and values, after a look at its padding.

        Raises:
            UnsupportedModelError: the model attends to something that it made of them.
        """
        new, self._new = self._new, None
        if call.key is not new[0] or call.value is not new[1]:
            raise UnsupportedModelError(
                f"{self.owner}: this model attends to other keys or values than its cache returned, and those are not "
                "kept; use transformers' DynamicCache for it"
            )
        self._read_pads(call.bounds, call.query.shape[2])
        self.midway = True  # until `hf.watch.ask` has the answer
        return new

    def _read_pads(self, bounds: Tensor | None, num_queries: int) -> None:
        """Learn where rows begin, and check that nothing else is hidden. Reads the bounds back, so in chunks only."""
        if bounds is None or (num_queries == 1 and all(self.seen > pads for pads in self.pads)):
            return
        if bounds.shape[1] > 1:
            raise ValueError(f"{self.owner}: packed documents in one row cannot be continued; give each its own row")
        end = self.seen + num_queries
        for row, (_, _, k0, k1) in enumerate(bounds[:, 0].tolist()):
            if k1 not in (k0, end):
                raise ValueError(
                    f"{self.owner}: row {row} is padded on the right; pad on the left (tokenizer.padding_side)"
                )
            if self.seen <= self.pads[row]:
                self.pads[row] = k0 if k1 > k0 else end
            elif k0 != self.pads[row]:
                raise ValueError(
                    f"{self.owner}: row {row} began after {self.pads[row]} pads, the mask now hides {k0} tokens"
                )


def inference_mode_if(filled: bool) -> AbstractContextManager[Any]:
    """Where tensors are changed that were `filled` under torch.inference_mode: those are changed only so."""
    return torch.inference_mode() if filled else nullcontext()


def decode(call: Call, keys: Tensor, values: Tensor, **which: Any) -> tuple[Tensor, ...]:
    """`sparse_decode` of the call's queries over `keys` and `values`; `which` says over which of them."""
    how = {"scale": call.scale, "softcap": call.softcap, "impl": kernel_impl(call.impl)}
    return sparse_decode(call.query, keys, values, **how, **which)


def kernel_impl(impl: str) -> str:
    """What an `impl` of `block_sparse` asks of an op that has a kernel and a reference only."""
    return impl if impl in ("triton", "reference") else "auto"


def negative(tokens_to_remove: Any) -> int:
    """What `crop` is given, as an int <= 0; assisted decoding in transformers 5.17 hands over a tensor.

    Raises:
        ValueError: a positive number, which once meant the length to keep.
    """
    tokens_to_remove = int(tokens_to_remove)
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): give a negative number, how many tokens to remove from the end")
    return tokens_to_remove
