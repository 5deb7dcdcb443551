"""`lcpatch eval` on a GPU: every task gives what the CPU gives, and a long window costs little beside the forward."""

from __future__ import annotations

import gc

import pytest
import torch
from eval_cases import DOCUMENTS, LENGTH, OPTIONS, QA_TASKS, model, tokenizer

from lcpatch.bench.model import build
from lcpatch.eval import Arm, evaluate, token_nll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ARMS = [Arm(), Arm("s2", {"block_size": 16, "local_blocks": 4, "stride": 4}, cache="s2")]


def cells(device: str, name: str) -> dict:
    given = {"arms": ARMS, "documents": DOCUMENTS, "seeds": 2, "options": OPTIONS.get(name)}
    report = evaluate(model().to(device), tokenizer(), [name], [LENGTH], **given)
    return {(cell["metric"], cell["arm"]): cell["mean"] for cell in report.cells}


@pytest.mark.parametrize("name", [*QA_TASKS, "perplexity"])
def test_scores_as_on_a_cpu(name):
    assert cells("cuda", name) == pytest.approx(cells("cpu", name), rel=1e-3)


@pytest.mark.xdist_group("much memory")
def test_a_long_window_of_a_large_model():
    """32K tokens, 32 layers of 4,096, a vocabulary of 128,256: at most 2 GiB above the forward that it needs."""
    net, ids = build(32), torch.randint(1000, 100000, (1, 32768), device="cuda")
    peaks = []
    for run in (lambda: net(ids, use_cache=False, logits_to_keep=1), lambda: token_nll(net, ids)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            run()
        peaks.append(torch.cuda.max_memory_allocated())
    print(f"bare forward {peaks[0] / 2**30:.2f} GiB, token_nll {peaks[1] / 2**30:.2f} GiB")
    assert peaks[1] - peaks[0] < 2 << 30
