"""`lcpatch bench attention`: our kernel beside FlashAttention-2, cuDNN and FlexAttention, forward and backward.

Every row says how many of the causal pairs its pattern keeps (density), the ideal gain over dense (1 / density), and
the share of the bf16 matmul rate, measured in the same run, that the kept pairs amount to: 4 D flops a pair forward,
10 D backward. A pattern is timed only after its output and all gradients passed a check at a length that the oracle
can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lcpatch_kernels import BlockSparseSpec, block_sparse
from lcpatch_kernels.block_sparse import dense as dense_oracle

from ..core.errors import BenchmarkError
from ..patterns import AttentionPattern, LayerShape
from ..patterns.s2 import S2
from ..patterns.sf import SF
from ..patterns.shift import Shift
from ..patterns.sink import Sink
from . import measure
from .environment import environment, need_gpu

CHECK_LENGTH = 2055  # odd, several tiles long, and small enough for the oracle's T x T scores


@dataclass(frozen=True)
class Shape:
    """Batch, query heads, KV heads and head dim of one measurement."""

    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads must be a multiple of the {self.num_kv_heads} KV heads")

    def inputs(self, length: int, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in bf16 with standard deviation 1, laid out as Hugging Face's layers hand them over."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        size = [(self.batch, length, h, self.head_dim) for h in heads]
        tensors = (torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in size)
        return tuple(t.requires_grad_(grad) for t in tensors)


SHAPES = {
    "32 / 8 heads of 128": Shape(),
    "32 / 8 heads of 64": Shape(head_dim=64),
    "32 / 8 heads of 256": Shape(head_dim=256),
    "32 / 32 heads of 128": Shape(num_kv_heads=32),
}
SHAPES_PATTERN = "s2 64/16/16"


@dataclass(frozen=True)
class Row:
    """One measurement; see the module's docstring for the terms. `why` says what kept it from running."""

    provider: str
    pattern: str
    length: int
    density: float
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    forward_vs_fa2: float | None = None
    backward_vs_fa2: float | None = None
    both_vs_fa2: float | None = None
    why: str | None = None


def cases() -> dict[str, AttentionPattern]:
    """The patterns measured. S2 is named block/local/stride and has no sink block, as in the literature's figures."""
    s2 = {
        f"s2 {b}/{n}/{v}": S2(b, n, v, sink_blocks=0)
        for b, n, v in [(64, 16, 16), (64, 16, 8), (128, 8, 16), (64, 16, 32)]
    }
    return {**s2, "sf N/4": SF(), "shift N/4": Shift(), "sink 4+1024": Sink()}


def run(
    lengths: tuple[int, ...],
    patterns: dict[str, AttentionPattern] | None = None,
    shape: Shape | None = None,
    peers: bool = True,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Check, then measure; gives `keep` the result after each row as it is.

    Raises:
        BenchmarkError: no GPU, or a check that failed: nothing is timed then.
    """
    need_gpu()
    shape, patterns = shape or Shape(), patterns or cases()
    torch.manual_seed(0)
    result = {**environment(commit), "shape": asdict(shape)}
    result["checks"] = [check(name, pattern, shape) for name, pattern in patterns.items()]
    for c in result["checks"]:
        say(f"check {c['pattern']:14s} " + "  ".join(f"{n} {e:.1e} <= {b:.1e}" for n, (e, b) in c["errors"].items()))
    if red := [c["pattern"] for c in result["checks"] if not c["passed"]]:
        raise BenchmarkError(f"wrong results for {', '.join(red)}: nothing is timed")
    result["matmul_tflops"] = measure.matmul_tflops()
    result["copy_gb_per_s"] = measure.copy_gb_per_s()
    say(f"ceilings: bf16 matmul {result['matmul_tflops']:.0f} TFLOP/s, copy {result['copy_gb_per_s']:.0f} GB/s")
    result["rows"] = []
    say(HEADER)
    for length in lengths:
        for row in _measure_length(length, patterns, shape, result["matmul_tflops"], peers):
            say(format_row(row))
            result["rows"].append(asdict(row))
            keep(result)
    return result


def run_shapes(
    lengths: tuple[int, ...],
    commit: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """`run` without FlexAttention for one pattern in every one of `SHAPES`; each row says which."""
    found: dict[str, Any] = {"rows": []}
    for name, shape in SHAPES.items():
        say(name)
        found = _run_shape(name, shape, found["rows"], lengths, commit, say, keep)
    return found


def _run_shape(
    name: str, shape: Shape, before: list[Any], lengths: tuple[int, ...], commit: str | None, say: Any, keep: Any
) -> dict[str, Any]:
    def behind(result: dict[str, Any]) -> dict[str, Any]:
        return {**result, "shape": None, "rows": before + [{"shape": name, **row} for row in result["rows"]]}

    pattern = {SHAPES_PATTERN: cases()[SHAPES_PATTERN]}
    return behind(
        run(lengths, pattern, shape, peers=False, commit=commit, say=say, keep=lambda result: keep(behind(result)))
    )


def check(name: str, pattern: AttentionPattern, shape: Shape) -> dict[str, Any]:
    """Our kernel against the dense oracle in fp32, at `CHECK_LENGTH`; the budget is twice the error of torch's bf16.

    That error is of the same computation in the same dtype: SDPA with the pattern as a dense mask. Both are relative,
    ||x - oracle|| / ||oracle||.
    """
    spec = spec_of(pattern, shape)
    q, k, v = shape.inputs(CHECK_LENGTH)
    grad = torch.randn_like(q)
    oracle = _out_and_grads(partial(_ours, spec=spec, impl="sdpa"), (q.float(), k.float(), v.float()), grad.float())
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in (1, shape.num_heads, CHECK_LENGTH, CHECK_LENGTH)), indexing="ij"
    )
    mask = dense_oracle.mask_mod(spec, None, CHECK_LENGTH, CHECK_LENGTH, q.device)(b, h, i, j)
    peer = _out_and_grads(partial(sdpa, attn_mask=mask, enable_gqa=True), (q, k, v), grad)
    ours = _out_and_grads(partial(_ours, spec=spec, impl="triton"), (q, k, v), grad)
    errors = {
        part: (relative_error(mine, true), 2 * relative_error(theirs, true))
        for part, mine, theirs, true in zip(("out", "dq", "dk", "dv"), ours, peer, oracle, strict=True)
    }
    return {"pattern": name, "errors": errors, "passed": all(e <= b for e, b in errors.values())}


HEADER = (
    f"{'provider':12s} {'pattern':12s} {'length':>7s} {'density':>8s} {'ideal':>6s} {'fwd ms':>9s} {'bwd ms':>9s} "
    f"{'fwd share':>9s} {'bwd share':>9s} {'fwd/FA2':>8s} {'bwd/FA2':>8s} {'both/FA2':>8s}"
)


def format_row(row: Row) -> str:
    """One line under `HEADER`."""
    start = f"{row.provider:12s} {row.pattern:12s} {row.length:7d} {row.density:8.2%} {1 / row.density:5.1f}x "
    if row.why is not None:
        return start + row.why
    numbers = [row.forward_ms, row.backward_ms, row.forward_share, row.backward_share]
    ratios = [row.forward_vs_fa2, row.backward_vs_fa2, row.both_vs_fa2]
    return start + " ".join(f"{x:9.3f}" for x in numbers) + " " + " ".join(f"{x or float('nan'):7.2f}x" for x in ratios)


def _measure_length(
    length: int, patterns: dict[str, AttentionPattern], shape: Shape, matmul: float, peers: bool
) -> Iterator[Row]:
    inputs = shape.inputs(length)
    grad = torch.randn_like(inputs[0])
    dense = _row("FA2", "causal", length, 1.0, _backend(SDPBackend.FLASH_ATTENTION, inputs), inputs, grad, matmul, None)
    yield dense
    cudnn = _backend(SDPBackend.CUDNN_ATTENTION, inputs)
    yield _row("cuDNN", "causal", length, 1.0, cudnn, inputs, grad, matmul, dense)
    for name, pattern in patterns.items():
        spec = spec_of(pattern, shape)
        measured = (spec.density(length), inputs, grad, matmul, dense)
        for provider, forward in _providers(pattern, spec, shape, inputs, peers).items():
            density, *rest = measured
            yield _row(provider, name, length, density, forward, *rest)


def _providers(
    pattern: AttentionPattern, spec: BlockSparseSpec, shape: Shape, inputs: tuple[Tensor, ...], peers: bool
) -> dict[str, Callable[[], Tensor]]:
    q, k, v = inputs
    found: dict[str, Callable[[], Tensor]] = {"lcpatch": partial(_ours, q, k, v, spec=spec, impl="triton")}
    if not peers:
        return found
    if isinstance(pattern, S2) and pattern.stride <= 16:  # each takes a minute to compile
        found["Flex"] = _flex(pattern, shape, inputs)
    if isinstance(pattern, Shift):
        found["cuDNN groups"] = partial(_grouped_cudnn, q, k, v, group=-(-q.shape[2] // 4))
    return found


def _row(
    provider: str,
    pattern: str,
    length: int,
    density: float,
    forward: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    matmul: float,
    fa2: Row | None,
) -> Row:
    try:
        forward_ms, backward_ms = measure.forward_backward_ms(forward, inputs, grad)
    except (RuntimeError, torch.OutOfMemoryError) as error:  # a peer that cannot run a row is part of the result
        if provider == "lcpatch":
            raise
        torch.cuda.empty_cache()
        return Row(provider, pattern, length, density, why=measure.in_a_line(error))
    batch, heads, _, dim = inputs[0].shape
    pairs = batch * heads * density * length * (length + 1) / 2
    rate = matmul * 1e9  # flops per ms
    row = Row(
        provider, pattern, length, density, forward_ms, backward_ms,
        forward_share=4 * dim * pairs / forward_ms / rate, backward_share=10 * dim * pairs / backward_ms / rate,
    )  # fmt: skip
    base = row if fa2 is None else fa2
    if base.forward_ms is None:
        return row
    ratios = {
        "forward_vs_fa2": base.forward_ms / forward_ms,
        "backward_vs_fa2": base.backward_ms / backward_ms,
        "both_vs_fa2": (base.forward_ms + base.backward_ms) / (forward_ms + backward_ms),
    }
    return Row(**{**asdict(row), **ratios})


def spec_of(pattern: AttentionPattern, shape: Shape) -> BlockSparseSpec:
    """The pattern compiled for one layer of `shape`."""
    return pattern.spec(LayerShape(shape.num_heads, shape.num_kv_heads))


def _ours(q: Tensor, k: Tensor, v: Tensor, spec: BlockSparseSpec, impl: str) -> Tensor:
    return block_sparse(q, k, v, spec, impl=impl)[0]


def _backend(backend: SDPBackend, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    q, k, v = inputs

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    return forward


def _grouped_cudnn(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    """Shifted groups by what torch has: both halves of the heads folded into a batch of dense causal groups.

    Rolls as LongLoRA's reshaping branch does: one dense call costs the same whether or not its wrapped group is cut.
    """
    half, kv_half = q.shape[1] // 2, k.shape[1] // 2

    def fold(x: Tensor, plain: int) -> Tensor:
        x = torch.cat([x[:, :plain], x[:, plain:].roll(-(group // 2), 2)], 1)
        return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = sdpa(fold(q, half), fold(k, kv_half), fold(v, kv_half), is_causal=True, enable_gqa=True)
    out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([out[:, :half], out[:, half:].roll(group // 2, 2)], 1)


def _flex(pattern: S2, shape: Shape, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """FlexAttention with S2's rule in closed form, so that it is not slowed by the generality of our `mask_mod`."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs
    torch._dynamo.reset()  # past 8 patterns and lengths dynamo would fall back to eager, which holds all scores
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = flex_block_mask(pattern, shape, q.shape[2], q.device)
    return partial(compiled, q, k, v, block_mask=block_mask, enable_gqa=True)


def flex_block_mask(pattern: S2, shape: Shape, length: int, device: torch.device) -> Any:
    """FlexAttention's `BlockMask` of S2 without sinks, from the pattern's blocks.

    `create_block_mask` would ask all H T T pairs, compiled anew for every pattern and length; asking each pair of
    64-token blocks gives the same tables (a test compares them) in 134 MB at 128K.
    """
    block, local, stride = pattern.block_size, pattern.local_blocks, pattern.stride
    group, tile = shape.num_heads // shape.num_kv_heads, dense_oracle.TILE

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = (j // block + h // group) % stride == 0
        return (j <= i) & ((i // block - j // block < local) | far)

    unit = min(block, tile)
    starts = torch.arange(0, -(-length // tile) * tile, unit, device=device)
    head = torch.arange(shape.num_heads, device=device)[:, None, None]
    seen = keep(head, head, starts[:, None] + unit - 1, starts)  # a unit pair's last row: whether any pair is kept
    whole = keep(head, head, starts[:, None], starts + unit - 1)  # its first row and last key: whether all are
    per = tile // unit
    seen, whole = (x.unflatten(2, (-1, per)).unflatten(1, (-1, per)) for x in (seen, whole))
    seen, whole = seen.any(4).any(2), whole.all(4).all(2)
    return dense_oracle.from_tiles(seen[None], whole[None], keep, (length, length))


def _out_and_grads(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative_error(x: Tensor, true: Tensor) -> float:
    """||x - true|| / ||true||; infinite for NaN, which never passes."""
    error = ((x.to(true.dtype) - true).norm() / true.norm()).item()
    return error if error == error else float("inf")
