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
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lcpatch_kernels import BlockSparseSpec, block_sparse
from lcpatch_kernels.block_sparse import dense as dense_oracle

from ..core.errors import BenchmarkError
from ..patterns import AttentionPattern
from ..patterns.s2 import S2
from ..patterns.shift import Shift
from . import measure
from .attention_cases import SHAPES, SHAPES_PATTERN, Shape, cases, spec_of
from .attention_peers import backend, flex, grouped_cudnn
from .environment import environment, need_gpu
from .judge import out_and_grads, passes, relative_error

CHECK_LENGTH = 2055  # odd, several tiles long, and small enough for the oracle's T x T scores


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
    oracle = out_and_grads(partial(_ours, spec=spec, impl="sdpa"), (q.float(), k.float(), v.float()), grad.float())
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in (1, shape.num_heads, CHECK_LENGTH, CHECK_LENGTH)), indexing="ij"
    )
    mask = dense_oracle.mask_mod(spec, None, CHECK_LENGTH, CHECK_LENGTH, q.device)(b, h, i, j)
    peer = out_and_grads(partial(sdpa, attn_mask=mask, enable_gqa=True), (q, k, v), grad)
    ours = out_and_grads(partial(_ours, spec=spec, impl="triton"), (q, k, v), grad)
    errors = {
        part: (relative_error(mine, true), 2 * relative_error(theirs, true))
        for part, mine, theirs, true in zip(("out", "dq", "dk", "dv"), ours, peer, oracle, strict=True)
    }
    return {"pattern": name, "errors": errors, "passed": all(passes(e, b) for e, b in errors.values())}


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
    dense = _row("FA2", "causal", length, 1.0, backend(SDPBackend.FLASH_ATTENTION, inputs), inputs, grad, matmul, None)
    yield dense
    cudnn = backend(SDPBackend.CUDNN_ATTENTION, inputs)
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
        found["Flex"] = flex(pattern, shape, inputs)
    if isinstance(pattern, Shift):
        found["cuDNN groups"] = partial(grouped_cudnn, q, k, v, group=-(-q.shape[2] // 4))
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


def _ours(q: Tensor, k: Tensor, v: Tensor, spec: BlockSparseSpec, impl: str) -> Tensor:
    return block_sparse(q, k, v, spec, impl=impl)[0]
