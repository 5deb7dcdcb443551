"""The kernel of column sums compiles for its chips and fits their shared memory: that takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a program may have


@pytest.mark.parametrize("arch", SHARED)
def test_tiles_fit(arch):
    """In a process of its own: this one may be interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == 12
    assert not [r for r in rows if r["shared"] > SHARED[arch] or r["spills"]]
    assert all(("wgmma" if arch >= 90 else "mma.sync") in r["products"] for r in rows)


def main(arch: int) -> None:
    rows = [build(d, one, group, arch) for d in (64, 128, 256) for one in (False, True) for group in (1, 4)]
    print(json.dumps(rows))


def build(head_dim: int, one: bool, group: int, arch: int) -> dict:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lcpatch_kernels.attn_mass.triton import _mass_kernel, tiles_for

    block_n, block_m, num_warps, num_stages = tiles_for(torch.bfloat16, head_dim)
    constants = {
        "GROUP": group, "D": head_dim, "BLOCK_D": head_dim, "BLOCK_M": 16 if one else block_m, "BLOCK_N": block_n,
        "REDUCE": 0, "ONE": one, "HAS_SOFTCAP": False, "UPCAST": False,
    }  # fmt: skip
    kinds = {"p_q": "*bf16", "p_k": "*bf16", "p_lse": "*fp32", "p_out": "*fp32", "p_bounds": "*i32"}
    floats = ("qk_scale", "cap_in", "cap_out")
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(_mass_kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = kinds.get(name, "fp32" if name in floats else "i32")
            if name in kinds or name.startswith("stride_"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(_mass_kernel, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    ptx = compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        "spills": ".local" in ptx,
        "products": [name for name in ("wgmma", "mma.sync") if name in ptx],
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
