"""`bench parallel --step` on two CPU ranks: checked, then timed; and it notices gradients that are not one GPU's."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from world import run_world

from lcpatch.bench import parallel_step, tables
from lcpatch.bench.geometry import TINY, random_llama
from lcpatch.bench.lora import with_lora
from lcpatch.cli import main
from lcpatch.core.errors import BenchmarkError
from lcpatch.training.parallel import Parallel


def steps(rank: int, wrong: bool) -> list[parallel_step.Row]:
    parallel_step.CHECK_LENGTH, parallel_step.GROUP = 130, 64
    if wrong:
        Parallel.sum_gradients = lambda self, parameters: None
    found = parallel_step.Steps(with_lora(random_llama(TINY, "cpu", torch.float32)), lambda line: None)
    found.check()
    return list(found.timed(256))


def test_steps_of_two_ranks_beside_one():
    rows, others = run_world(2, steps, False)
    assert [(row.arm, row.ranks, row.seconds) for row in rows] == [(o.arm, o.ranks, o.seconds) for o in others]
    assert [row.ranks for row in rows] == [1, 2] * 3
    assert all(row.seconds > 0 and row.why is None for row in rows)
    assert all(row.strategy for row in rows[1::2])
    header, lines = tables.steps({"rows": [asdict(row) for row in rows]})
    assert [len(line) for line in lines] == [len(header)] * 6


def one_lacks_memory(rank: int) -> list[parallel_step.Row]:
    found = parallel_step.Steps(with_lora(random_llama(TINY, "cpu", torch.float32)), lambda line: None)
    step = found._step

    def full(length, ranks):
        if rank == 1 and ranks is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(length, ranks)

    found._step = full
    return list(found.timed(256))


def test_a_row_too_long_for_one_gpu_is_still_timed_on_several():
    for rows in run_world(2, one_lacks_memory):
        assert {(row.why, row.seconds) for row in rows[::2]} == {("out of memory", None)}
        assert all(row.seconds > 0 and row.speedup is None for row in rows[1::2])


def one_allows_less(rank: int) -> None:
    """Rank 1's own budget is so small that alone it would stop, and rank 0 wait for it in what is timed next."""
    parallel_step.CHECK_LENGTH = 130
    parallel_step.FACTOR *= 1e-6 if rank == 1 else 1
    parallel_step.Steps(with_lora(random_llama(TINY, "cpu", torch.float32)), lambda line: None).check()


def test_all_ranks_come_to_the_same_verdict():
    assert run_world(2, one_allows_less) == [None] * 2


def test_gradients_of_a_part_alone_stop_it():
    for answer in run_world(2, steps, True):
        assert answer.startswith("BenchmarkError: dense: gradients are ")


def test_it_says_how_it_is_started(capsys: pytest.CaptureFixture):
    with pytest.raises(BenchmarkError, match=r"torchrun --nproc-per-node gpu .* --step"):
        parallel_step.run((65536,))
    assert main(["bench", "parallel", "--step", "--time"]) == 2
    assert "--time and --step are two runs" in capsys.readouterr().err
