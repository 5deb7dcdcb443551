"""What of the benchmarks a machine without a GPU can check: their peers' inputs, their tables, their refusals."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import lcpatch
from lcpatch.bench import attention, attention_peers, decode, tables
from lcpatch.bench.attention_cases import Shape, spec_of
from lcpatch.bench.environment import environment
from lcpatch.core.errors import BenchmarkError

SHAPE = Shape(num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("length", [1024, 1500])
@pytest.mark.parametrize("blocks", [(64, 4, 3), (128, 2, 5), (64, 3, 2)])
def test_flex_is_given_the_pattern(blocks, length):
    pattern = lcpatch.S2(*blocks, sink_blocks=0)
    ours = attention_peers.flex_block_mask(pattern, SHAPE, length, torch.device("cpu"))
    spec = spec_of(pattern, SHAPE)
    keep = attention.dense_oracle.mask_mod(spec, None, length, length, torch.device("cpu"))
    theirs = create_block_mask(keep, 1, SHAPE.num_heads, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    index = torch.meshgrid(torch.arange(1), torch.arange(4), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(ours.mask_mod(*index), keep(*index))
    # Blocks called full are not masked again, so they must be.
    full = torch.zeros_like(ours.to_dense(), dtype=torch.bool)
    for h in range(SHAPE.num_heads):
        for q in range(full.shape[2]):
            full[0, h, q, ours.full_kv_indices[0, h, q, : ours.full_kv_num_blocks[0, h, q]].long()] = True
    tiles = torch.nn.functional.pad(keep(*index), (0, -length % 128, 0, -length % 128))
    tiles = tiles.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).all(5).all(3)
    inside = length // 128  # the last tile is cut by the text's end
    assert torch.equal(full[..., :inside, :inside], tiles[..., :inside, :inside])


@pytest.mark.parametrize("run", [attention.run, decode.run])
def test_without_a_gpu_nothing_is_measured(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ((1024,),) if run is attention.run else ((1024,), (1,), {}, SHAPE)
    with pytest.raises(BenchmarkError, match="needs a CUDA GPU"):
        run(*arguments)


def test_bytes_of_a_decode_step_count_each_kv_head_once():
    pattern = lcpatch.S2(64, 4, 3, sink_blocks=0)
    length = 64 * 30
    spec = spec_of(pattern, SHAPE)
    kept = [len([b for b in range(30) if 29 - b < 4 or b % 3 == c]) for c in (0, 2)]
    assert decode._share(spec, SHAPE, length) == pytest.approx(sum(kept) / (2 * 30))


def test_tables_show_every_row_and_what_could_not_run(tmp_path):
    rows = [
        attention.Row("FA2", "causal", 8192, 1.0, 2.0, 4.0, 0.4, 0.4, 1.0, 1.0, 1.0),
        attention.Row("lcpatch", "s2 64/16/16", 8192, 0.25, 0.5, 1.0, 0.5, 0.45, 4.0, 4.0, 4.0),
        attention.Row("Flex", "s2 64/16/16", 8192, 0.25, why="out of memory"),
    ]
    result = {**environment("abc"), "rows": [attention.asdict(row) for row in rows], "matmul_tflops": 800.0}
    header, lines = tables.attention(result)
    assert all(len(line) == len(header) for line in lines)
    assert "4.0×" in lines[1][2]
    assert lines[2][2] == "out of memory"
    assert "commit abc" in tables.provenance(result)
    shaped = {**result, "rows": [{"shape": "32 / 8 heads of 64", **row} for row in result["rows"]]}
    assert [line[0] for line in tables.shapes(shaped)[1]] == ["32 / 8 heads of 64"] * 3
    tables.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
