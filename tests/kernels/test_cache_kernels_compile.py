"""The kernels of the selecting caches compile for their chips and fit their shared memory: that takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a program may have
DTYPES = ("bf16", "fp32")


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_fit(arch):
    """In a process of its own: this one may be interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {(r["kernel"], r["dtype"]) for r in rows} == {
        (k, d) for k in ("match", "merge", "bounds", "scores", "decode", "take", "bring") for d in DTYPES
    }
    assert not [r for r in rows if r["shared"] > SHARED[arch]]


def main(arch: int) -> None:
    from lcpatch_kernels.cluster_merge import TRITON_MAX_BYTES
    from lcpatch_kernels.cluster_merge import triton as merging
    from lcpatch_kernels.page_scores import triton as paging
    from lcpatch_kernels.resident_pages import KINDS, RecordLayout
    from lcpatch_kernels.resident_pages import triton as tiering
    from lcpatch_kernels.sparse_decode import triton as decoding

    # What remains behind whole chunks has any size, and no size may be compiled for.
    constants = {p.name for f in (merging._match_kernel, merging._merge_kernel) for p in f.params if p.is_constexpr}
    assert constants == {"HALF", "D", "BLOCK_D", "UPCAST", "BLOCK_N", "BLOCK_O", "WEIGHTED"}, constants
    rows = []
    for dtype in DTYPES:
        for slots in (16, 512, 4096):
            sizes = {"BLOCK_M": 128, "BLOCK_S": slots}
            rows.append(build("take", tiering._take_kernel, sizes, dtype, arch, max(4, slots // 256)))
        for kind in KINDS:
            if kind != "fp64":
                bits = RecordLayout(kind, 0).bits
                layout = {"KIND": kind, "BITS": bits, "SCALES": 8192, "LOWS": 9216, "GROUP": 32}
                piece = {"HALF": 32 * 128, "BLOCK": tiering.BLOCK}
                rows.append(build("bring", tiering._bring_kernel, layout | piece, dtype, arch, 4))
        for head_dim in (64, 256):
            shape = {"D": head_dim, "BLOCK_D": head_dim, "UPCAST": False}
            for chunk in (64, min(256, TRITON_MAX_BYTES // head_dim // (2 if dtype == "bf16" else 4))):
                merge = {"BLOCK_N": merging.BLOCK_N, "BLOCK_O": merging.BLOCK_O, "WEIGHTED": True}
                match = {"HALF": max(16, chunk // 2)}
                warps = 8 if chunk > 128 else 4
                rows.append(build("match", merging._match_kernel, shape | match, dtype, arch, warps))
                rows.append(build("merge", merging._merge_kernel, shape | merge, dtype, arch, 4, merging.MERGE_STAGES))
            bounds, scores = {"BLOCK_N": paging.BLOCK_N}, {"GROUP": 16, "BLOCK_P": paging.BLOCK_P, "LOWER": False}
            rows.append(build("bounds", paging._bounds_kernel, shape | bounds, dtype, arch, 4))
            for has_bounds in (False, True):
                options = shape | scores | {"HAS_BOUNDS": has_bounds}
                rows.append(build("scores", paging._scores_kernel, options, dtype, arch, 4))
            absent = dict.fromkeys(("p_slots", "p_num_keys", "p_bias", "p_k_scale", "p_v_scale"))
            flags = dict.fromkeys(("HAS_SINK", "HAS_STRIPE", "HAS_RATIO", "HAS_SOFTCAP"), False)
            keys = decoding.tile_keys(head_dim, 2 if dtype == "bf16" else 4)
            tile = {"PACK": 16, "BLOCK_N": keys, "PAGE": 1, "BLOCK_SIZE": 1}
            for scores in ({"FILLS": True}, {"FILLS": False}, {"FILLS": False, "p_scores": None}):
                options = shape | absent | flags | tile | scores
                rows.append(build("decode", decoding._decode_kernel, options, dtype, arch, 4))
    print(json.dumps(rows))


def build(kernel: str, function, constants: dict, dtype: str, arch: int, num_warps: int, num_stages: int = 3) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"p_size": "fp32", "p_size_out": "fp32", "p_target": "i32", "p_bounds": "i32"}
    if kernel in ("take", "bring"):
        kinds = {name: "i64" for name in function.arg_names if name not in ("p_slots", "p_data")} | {"p_slots": "i32"}
    if kernel == "scores":
        kinds["p_out"] = "fp32"
    if kernel == "decode":
        kinds |= {"p_packs": "i32", **dict.fromkeys(("p_part_out", "p_part_lse", "p_scores"), "fp32")}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name], attributes[(i,)] = f"*{kinds.get(name, dtype)}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("qk_scale", "cap_in", "cap_out") else "i32"
    compiled = triton.compile(
        ASTSource(function, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return {"kernel": kernel, "dtype": dtype, "constants": str(constants), "shared": compiled.metadata.shared}


if __name__ == "__main__":
    main(int(sys.argv[1]))
