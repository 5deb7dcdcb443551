"""Block-sparse attention in Triton: the launchers. The kernels are in `_triton_fwd.py` and `_triton_bwd.py`.

The signatures and the meaning are those of reference.py. What a launch depends on are shapes, strides and the spec,
never the contents of a tensor: nothing synchronises with the host, and a CUDA graph may record every launch after the
first of its spec (which copies the pattern's few integers to the device).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._triton_bwd import _bwd_dkdv_kernel, _bwd_dq_kernel, _delta_kernel
from ._triton_common import INTERPRETED, LOG2E, PackTable, pack_table
from ._triton_fwd import _fwd_kernel
from ._triton_sink import _bwd_sink_kernel, _sum_sinks_kernel
from .spec import BlockSparseSpec, cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Tiles of one kernel: `pack` query heads x `block_m` positions are its rows, `block_n` keys its columns.

    dk and dv take one head's rows at a time: there `pack` is 1.
    """

    block_m: int
    pack: int
    block_n: int
    num_warps: int
    num_stages: int


# (rows = pack * block_m, block_n, num_warps, num_stages) by kernel and padded head dim. "hopper" holds compute
# capability 9.0 and later, measured on an H100; "ampere" fits the 99 KB of shared memory that sm_86 and sm_89 give a
# program and was only compiled. `config` adds what depends on pattern and length.
_HALF: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "hopper": {
        "fwd": {64: (128, 64, 8, 3), 128: (128, 64, 4, 3), 256: (128, 64, 8, 2)},
        "dq": {64: (128, 64, 4, 3), 128: (128, 64, 8, 4), 256: (128, 32, 8, 2)},
        "dkdv": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 3)},
    },
    "ampere": {
        "fwd": {64: (128, 64, 4, 3), 128: (128, 32, 4, 3), 256: (64, 32, 4, 2)},
        "dq": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
        "dkdv": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
    },
}
_SINGLE = {64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}  # fp32 multiplies without tensor cores
_MOST_SINKS = 32  # sink tokens beyond which their rows are no longer shared out
_TINY = (64, 32, 4, 1)  # interpreted: several tiles and steps at the tests' lengths
_LONG = 1 << 16  # more keys than this are another length bucket


def config(
    kernel: str,
    arch: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    spec: BlockSparseSpec,
    num_kv_heads: int,
    num_queries: int,
    num_keys: int,
) -> Config:
    """The tiles of `kernel` ("fwd", "dq", "dkdv") on compute capability `arch`; None is the interpreter.

    Nothing is tuned at run time: a new length, pattern or model finds its tiles here and compiles once for each.
    """
    padded = max(64, next_power_of_2(head_dim))
    has_stripe = any(rule.stride > 1 for rule in spec.rules)
    heads = max(pack.num_heads for pack in spec.packs(num_kv_heads))
    pack = 2 if heads % 2 == 0 else 1  # two heads of 64 rows read K and V as often as one of 128, and mask less
    if arch is None:
        rows, *rest = _TINY
    elif dtype == torch.float32:
        rows, *rest = _SINGLE[padded]
    else:
        rows, *rest = _HALF["hopper" if arch >= (9, 0) else "ampere"][kernel][padded]
        if arch >= (9, 0) and padded == 128:
            if kernel == "fwd" and not has_stripe:
                rest = [128, 8, 3]
            elif kernel == "fwd" and spec.block_size >= 128 and num_keys > _LONG:
                rows, pack = 64, 1
            elif kernel == "fwd":
                rows, pack = 64, min(4, next_power_of_2(heads))
            elif kernel == "dkdv" and (not has_stripe or (spec.block_size >= 128 and num_keys > _LONG)):
                rest = [128, 8, 4]
    if kernel == "dkdv":
        return Config(min(rows, 32) if arch is None else rows, 1, *rest)
    if num_queries <= 16:  # decoding: fill the rows with heads; a dot wants 16 of them
        block_m = 1 if num_queries == 1 else 16
        pack = max(16 // block_m, min(next_power_of_2(heads), rows // block_m))
    else:
        block_m = rows // pack
    return Config(block_m, pack, *rest)


def sink_tiles(dtype: torch.dtype | None, head_dim: int, sinks: int) -> Config:
    """The tiles of the sinks' own kernel, `sinks` keys wide; dtype None is the interpreter."""
    padded = max(64, next_power_of_2(head_dim))
    if dtype is None or dtype == torch.float32:
        return Config(32 if padded <= 128 else 16, 1, sinks, 4, 1)
    return Config(64, 1, sinks, 4, 2) if padded <= 128 else Config(32, 1, sinks, 4, 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
    tiles: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out [B, H, T, D], lse [B, H, T])`; rows that see nothing are 0 and -inf. `tiles`: for the tuner."""
    q, k, v, bounds = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v), _bounds(bounds)
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    (batch, heads, num_queries, head_dim), num_keys = q.shape, k.shape[2]
    # Rows in no segment belong to no program.
    new = torch.empty if bounds is None else torch.zeros
    out = new((batch, num_queries, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, num_queries), dtype=torch.float32, device=q.device)
    if bounds is not None:
        lse.fill_(-torch.inf)
    if not out.numel():
        return out, lse
    tiles = tiles or _config("fwd", q, k, spec)
    bias = None if bias is None else bias.contiguous()
    has_gap = bounds is not None and bounds.shape[2] == 5  # then a row need not have a key of its own
    table = pack_table(spec, k.shape[1], tiles.pack, q.device)
    num_slots = _query_slots(bounds, num_queries, num_keys, tiles.block_m)
    boxes = _key_boxes(k, v, spec, table, tiles, scale)
    with _on(q):
        _fwd_kernel[(num_slots * table.num_packs * batch,)](
            q, k, v, out, lse, bounds, table.packs, bias, *boxes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], 0 if bias is None else bias.stride(0),
            *_segment_args(bounds), num_slots, table.num_packs, heads, num_queries, num_keys,
            *_scales(scale, softcap),
            HAS_BIAS=bias is not None, PACK=tiles.pack, TMA=boxes[0] is not None,
            FIXED=q.dtype != torch.float16 and not has_gap,
            **_constants(q, spec, bounds, softcap, table, tiles),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` in the inputs' dtypes, summed in fp32."""
    grad_out, q, k, v, out = (_rows_contiguous(x) for x in (grad_out, q, k, v, out))
    terms = launch_terms(grad_out, grad_lse, out, lse, _copies(bounds, q.shape[2], k.shape[2]))
    args = (grad_out, q, k, v, terms, spec, bounds, scale, softcap)
    return launch_dq(*args), *launch_dkdv(*args)


def _copies(bounds: Tensor | None, num_queries: int, num_keys: int) -> int:
    """How many copies `launch_terms` must make; see there."""
    return 1 if bounds is None and (num_keys - num_queries) % 4 == 0 else 4


def launch_terms(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, copies: int = 1) -> Tensor:
    """What dq, dk and dv need of each row, [2, copies, B, H, at least T] in fp32.

    First delta = rowsum(grad_out * out) - grad_lse, then the LSE in base 2. Copy n starts n rows later: a descriptor
    reads 16 bytes from a multiple of 16 bytes on, so to start at any row takes four copies.
    """
    batch, heads, num_queries, head_dim = out.shape
    line = cdiv(num_queries, 4) * 4
    terms = torch.empty((2, copies, batch, heads, line), dtype=torch.float32, device=out.device)
    if not terms.numel():
        return terms
    block_d = max(16, next_power_of_2(head_dim))
    block_m = 4096 // block_d
    with _on(out):
        _delta_kernel[(cdiv(num_queries, block_m) * heads * batch,)](
            grad_out, out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), *terms,
            *grad_out.stride()[:3], *out.stride()[:3], line, heads * batch, heads, num_queries,
            D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, HAS_DLSE=grad_lse is not None, SHIFTS=copies,
        )  # fmt: skip
    return terms


def launch_dq(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    tiles: Config | None = None,
) -> Tensor:
    """Gradient of q, from `launch_terms`'s result."""
    bounds = _bounds(bounds)
    (batch, heads, num_queries, _), num_keys = q.shape, k.shape[2]
    dq = (torch.empty if bounds is None else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    if not dq.numel():
        return dq
    tiles = tiles or _config("dq", q, k, spec)
    table = pack_table(spec, k.shape[1], tiles.pack, q.device)
    num_slots = _query_slots(bounds, num_queries, num_keys, tiles.block_m)
    boxes = _key_boxes(k, v, spec, table, tiles, scale)
    delta, lse = terms
    with _on(q):
        _bwd_dq_kernel[(num_slots * table.num_packs * batch,)](
            q, k, v, grad_out, dq, lse, delta, bounds, table.packs, *boxes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
            terms.shape[-1], *_segment_args(bounds), num_slots, table.num_packs, heads, num_queries, num_keys,
            scale, *_scales(scale, softcap),
            PACK=tiles.pack, TMA=boxes[0] is not None,
            **_constants(q, spec, bounds, softcap, table, tiles),
        )  # fmt: skip
    return dq


def launch_dkdv(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    tiles: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, from `launch_terms`'s result."""
    bounds = _bounds(bounds)
    (batch, heads, num_queries, _), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    new = torch.empty if bounds is None else torch.zeros  # keys in no segment belong to no program
    dk, dv = (new(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if not q.numel():
        return dk.zero_(), dv.zero_()
    tiles = tiles or _config("dkdv", q, k, spec)
    table = pack_table(spec, num_kv_heads, None, q.device)
    unit = max(spec.block_size, tiles.block_n) if table.flags["HAS_STRIPE"] else tiles.block_n
    num_segments = 0 if bounds is None else bounds.shape[1]
    num_slots = (cdiv(num_keys, unit) + num_segments) * (unit // tiles.block_n)
    num_rows = num_kv_heads * batch
    num_long, team = (0, 1) if bounds is not None else _teams(spec, num_rows, num_keys, tiles, q.device)
    constants = _constants(q, spec, bounds, softcap, table, tiles)
    if apart := _sinks_apart(spec, bounds, table):
        constants["HAS_SINK"] = False
    delta, lse = terms
    boxes = (None,) * 4
    if _takes_descriptors(q, grad_out):
        boxes = (
            _box(q, tiles.block_m),
            _box(grad_out, tiles.block_m),
            _line(lse, tiles.block_m),
            _line(delta, tiles.block_m),
        )
    with _on(q):
        _bwd_dkdv_kernel[(num_slots * num_rows,)](
            q, k, v, grad_out, dk, dv, lse, delta, bounds, table.packs, table.starts, *boxes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3],
            terms.shape[-1], heads * batch, *_segment_args(bounds), num_slots, num_kv_heads,
            min(num_long, num_slots), team, heads, num_queries, num_keys, scale, *_scales(scale, softcap),
            TMA=boxes[0] is not None,
            UNIFORM=table.uniform,
            REORDER=table.uniform or tiles.block_n <= spec.block_size,
            SHIFTS=terms.shape[1],
            COPIES=max(1, tiles.num_warps * 32 // tiles.block_m),
            **constants,
        )  # fmt: skip
    if apart:
        _launch_sinks(dk, dv, grad_out, q, k, v, terms, spec, bounds, scale, softcap, table)
    return dk, dv


def _sinks_apart(spec: BlockSparseSpec, bounds: Tensor | None, table: PackTable) -> bool:
    """Whether the sink keys' dk and dv come from kernels of their own.

    Not with more sinks than a tile of them; with a stripe, whose tiles are as long as the sinks'; and in packed rows,
    whose documents have sinks of their own each, and rows beyond a gap.
    """
    one_segment = bounds is None or bounds.shape[1:] == (1, 4)
    most = max(rule.sinks for rule in spec.rules)
    return table.flags["HAS_SINK"] and not table.flags["HAS_STRIPE"] and most <= _MOST_SINKS and one_segment


def _launch_sinks(
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    spec: BlockSparseSpec,
    bounds: Tensor | None,
    scale: float,
    softcap: float,
    table: PackTable,
) -> None:
    """Write dk and dv of the sink keys."""
    (batch, heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    most, num_rows = max(rule.sinks for rule in spec.rules), batch * num_kv_heads
    sinks = max(16, next_power_of_2(most))
    tiles = sink_tiles(None if INTERPRETED else q.dtype, head_dim, sinks)
    # About four programs a processor, none with less work than it takes to start one.
    chunk = max(cdiv(num_queries * num_rows, 4 * _num_processors(q.device)), 256) if q.is_cuda else 1
    chunk = cdiv(chunk, tiles.block_m) * tiles.block_m
    num_slots = cdiv(num_queries, chunk)
    sums = torch.empty((num_slots, batch, num_kv_heads, 2, sinks, head_dim), dtype=torch.float32, device=q.device)
    delta, lse = (x[0] for x in terms)
    constants = _constants(q, spec, bounds, softcap, table, tiles)
    for name in ("BLOCK_N", "BLOCK_SIZE", "GAP", "HAS_SINK", "HAS_STRIPE"):
        del constants[name]
    stride_bounds = _segment_args(bounds)[0]
    with _on(q):
        _bwd_sink_kernel[(num_slots * num_rows,)](
            q, k, v, grad_out, sums, lse, delta, bounds, table.packs, table.starts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], terms.shape[-1],
            stride_bounds, num_rows, num_kv_heads, chunk, heads, num_queries, num_keys, *_scales(scale, softcap),
            SINKS=sinks, COPIES=max(1, tiles.num_warps * 32 // tiles.block_m), **constants,
        )  # fmt: skip
        _sum_sinks_kernel[(num_rows,)](
            sums, dk, dv, bounds, *dk.stride()[:3], stride_bounds, num_rows, num_slots, num_kv_heads, most, num_keys,
            scale, D=head_dim, BLOCK_D=constants["BLOCK_D"], SINKS=sinks, SEGMENTS=constants["SEGMENTS"],
        )  # fmt: skip


def _teams(spec: BlockSparseSpec, num_rows: int, num_keys: int, tiles: Config, device: torch.device) -> tuple[int, int]:
    """`(num_long, team)`: the stripe's tiles of a KV head, and how many KV heads' run at once; any values are right."""
    stride = max(rule.stride for rule in spec.rules)
    if stride < 2:
        return 0, 1
    stripe = cdiv(num_keys, spec.block_size * stride) * spec.block_size
    num_long = cdiv(stripe, tiles.block_n)
    at_once = _num_processors(device) * max(1, 8 // tiles.num_warps) if device.type == "cuda" else 4
    fits = [n for n in range(1, num_rows + 1) if num_rows % n == 0 and n * num_long <= at_once * 1.1]
    return num_long, max(fits, default=1)


def _key_boxes(k: Tensor, v: Tensor, spec: BlockSparseSpec, table: PackTable, tiles: Config, scale: float) -> tuple:
    """Descriptors of K and V, or None twice: a box is one run of keys, and a masked -inf times a scale of 0 is NaN."""
    gathers = table.flags["HAS_STRIPE"] and tiles.block_n > spec.block_size
    if gathers or scale == 0 or not _takes_descriptors(k, v):
        return None, None
    return _box(k, tiles.block_n), _box(v, tiles.block_n)


def _takes_descriptors(*tensors: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can read them: 16-byte aligned rows of 16 bits a number."""
    for x in tensors:
        if x.is_cuda and (x.dtype == torch.float32 or _arch(x.device) < (9, 0)):
            return False
        steps = [
            stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
        ]
        if x.data_ptr() % 16 or any(step <= 0 or step % 16 for step in steps):
            return False
    return True


def _box(x: Tensor, rows: int) -> TensorDescriptor:
    # The stride of a dimension of size 1 says nothing and may be odd.
    strides = [stride if size > 1 else 1024 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, max(16, next_power_of_2(x.shape[-1]))])


def _line(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x[..., 0].numel(), x.shape[-1]], [x.shape[-1], 1], [1, rows])


def _constants(
    q: Tensor, spec: BlockSparseSpec, bounds: Tensor | None, softcap: float, table: PackTable, tiles: Config
) -> dict[str, Any]:
    """What a kernel is compiled for. Lengths are not among it: a new one compiles nothing."""
    return {
        "D": q.shape[-1],
        "BLOCK_D": max(16, next_power_of_2(q.shape[-1])),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_SIZE": spec.block_size if table.flags["HAS_STRIPE"] else 1,
        "SEGMENTS": 0 if bounds is None else max(2, next_power_of_2(bounds.shape[1])),
        "GAP": bounds is not None and bounds.shape[2] == 5,
        "HAS_SOFTCAP": softcap != 0,
        "UPCAST": INTERPRETED and q.dtype != torch.float32,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **table.flags,
    }


def _scales(scale: float, softcap: float) -> tuple[float, float, float]:
    """(qk_scale, cap_in, cap_out) for softmax in base 2; tanh(x) is computed from 2 log2(e) x."""
    cap_in = 2 * LOG2E * scale / softcap if softcap else 0.0
    return scale * LOG2E, cap_in, softcap * LOG2E


def _query_slots(bounds: Tensor | None, num_queries: int, num_keys: int, block_m: int) -> int:
    """Tiles of a batch row. Tiles sit on the grid of positions: a segment may cut one at either end."""
    if bounds is not None:
        return num_queries // block_m + 2 * bounds.shape[1]
    return cdiv(num_keys, block_m) - (num_keys - num_queries) // block_m


def _segment_args(bounds: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bounds is None else (bounds.stride(0), bounds.shape[1])


def _bounds(bounds: Tensor | None) -> Tensor | None:
    if bounds is None or bounds.stride()[1:] == (bounds.shape[2], 1):
        return bounds
    return bounds.contiguous()


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(kernel: str, q: Tensor, k: Tensor, spec: BlockSparseSpec) -> Config:
    arch = _arch(q.device) if q.is_cuda else None
    return config(kernel, arch, q.dtype, q.shape[-1], spec, k.shape[1], q.shape[2], k.shape[2])


@lru_cache(maxsize=16)
def _arch(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(x: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
