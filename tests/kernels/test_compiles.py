"""Every stored choice of tiles compiles for its chips and fits their shared memory: that takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a program may have
HEAD_DIMS = (64, 128, 256)
KERNELS = ("fwd", "dq", "dkdv", "sink")
POINTERS = {
    "p_bounds": "i32",
    "p_lse": "fp32",
    "p_delta": "fp32",
    "p_sums": "fp32",
    "p_packs": "i32",
    "p_starts": "i32",
    "p_bias": "fp32",
}  # others: bf16


@pytest.mark.parametrize("arch", SHARED)
def test_tiles_fit(arch):
    """In a process of its own: this one may be interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {(r["kernel"], r["head_dim"]) for r in rows} == {(k, d) for k in KERNELS for d in HEAD_DIMS}
    over = [r for r in rows if r["shared"] > SHARED[arch]]
    assert not over
    # What the tensor-core paths of sm_90 are for: asynchronous products, and tiles fetched by the copy engine.
    assert all(r["tensor_cores"] for r in rows)
    assert all(r["copy_engine"] for r in rows if arch >= 90 and r["kernel"] != "sink")


def main(arch: int) -> None:
    import torch

    from lcpatch_kernels.block_sparse import BlockSparseSpec, Rule
    from lcpatch_kernels.block_sparse.triton import config, sink_tiles

    stripe = BlockSparseSpec.of([Rule(0, 16, 0, 64, False, 960)] * 2)
    group = BlockSparseSpec.of([Rule(0, 0, 0, 8192, False, 0)] * 2)
    rows = []
    for kernel in ("fwd", "dq", "dkdv"):
        for head_dim in HEAD_DIMS:
            tiles = {
                config(kernel, divmod(arch, 10), torch.bfloat16, head_dim, spec, 1, length, length): spec
                for spec in (stripe, group)
                for length in (1 << 14, 1 << 17)
            }
            for choice, spec in tiles.items():
                rows.append({"kernel": kernel, "head_dim": head_dim, **build(kernel, head_dim, choice, spec, arch)})
        for gap in (False, True):  # packed rows, and queries that stand past their keys
            choice = config(kernel, divmod(arch, 10), torch.bfloat16, 128, stripe, 1, 1 << 14, 1 << 14)
            rows.append({"kernel": kernel, "head_dim": 128, **build(kernel, 128, choice, stripe, arch, 2, gap)})
    for head_dim in HEAD_DIMS:
        choice = config("fwd", divmod(arch, 10), torch.bfloat16, head_dim, group, 1, 1 << 13, 1 << 15)
        for segments in (0, 1):
            biased = build("fwd", head_dim, choice, group, arch, segments, bias=True)
            rows.append({"kernel": "fwd", "head_dim": head_dim, **biased})
    for head_dim in HEAD_DIMS:
        for sinks in (16, 32):
            choice = sink_tiles(torch.bfloat16, head_dim, sinks)
            rows.append({"kernel": "sink", "head_dim": head_dim, **build("sink", head_dim, choice, group, arch)})
    print(json.dumps(rows))


def build(kernel, head_dim, tiles, spec, arch, segments=0, gap=False, bias=False) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lcpatch_kernels.block_sparse import _triton_bwd, _triton_fwd, _triton_sink

    function = {
        "fwd": _triton_fwd._fwd_kernel,
        "dq": _triton_bwd._bwd_dq_kernel,
        "dkdv": _triton_bwd._bwd_dkdv_kernel,
        "sink": _triton_sink._bwd_sink_kernel,
    }[kernel]
    has_stripe = spec.rules[0].stride > 0
    block_size = spec.block_size if has_stripe else 1
    tma = arch >= 90 and (kernel == "dkdv" or not has_stripe or tiles.block_n <= block_size)
    constants = {
        "D": head_dim, "BLOCK_D": head_dim, "BLOCK_M": tiles.block_m, "PACK": tiles.pack, "BLOCK_N": tiles.block_n,
        "BLOCK_SIZE": block_size, "SEGMENTS": segments, "GAP": gap, "HAS_SINK": False, "HAS_STRIPE": has_stripe,
        "HAS_RATIO": False, "HAS_SOFTCAP": False, "HAS_BIAS": bias, "UPCAST": False, "TMA": tma, "FIXED": not gap,
        "UNIFORM": True, "REORDER": True, "SHIFTS": 4 if segments else 1, "SINKS": tiles.block_n,
        "COPIES": max(1, tiles.num_warps * 32 // tiles.block_m),
    }  # fmt: skip
    absent = {name for name, there in (("p_bounds", segments), ("p_bias", bias)) if not there}
    box = {"d_k": tiles.block_n, "d_v": tiles.block_n, "d_q": tiles.block_m, "d_do": tiles.block_m}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in absent or (name.startswith("d_") and not tma):
            signature[name], values[(i,)] = "constexpr", None
        elif name in box:
            signature[name] = f"tensordesc<bf16[1, 1, {box[name]}, {head_dim}]>"
        elif name in ("d_lse", "d_delta"):
            signature[name] = f"tensordesc<fp32[1, {tiles.block_m}]>"
        elif name.startswith("p_"):
            kind = POINTERS.get(name, "bf16")
            signature[name], attributes[(i,)] = f"*{kind}", [["tt.divisibility", 16]]
        elif name in ("scale", "qk_scale", "cap_in", "cap_out"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") and name != "stride_bounds":
                attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    ptx = compiled.asm["ptx"]
    return {
        "tiles": str(tiles),
        "shared": compiled.metadata.shared,
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "copy_engine": "cp.async.bulk.tensor" in ptx,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
