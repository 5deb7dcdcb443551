"""The README's table of caches' answers, from what `lcpatch eval` writes."""

from __future__ import annotations

import json

from eval_cases import DOCUMENTS, model, tokenizer

from lcpatch.bench import tables
from lcpatch.eval import Arm, evaluate


def test_a_report_becomes_a_table(tmp_path):
    arms = [Arm(), Arm(cache="sink", cache_options={"budget": 64})]
    asked = {"documents": DOCUMENTS, "seeds": 2, "options": {"depths": 2}, "name": "tiny"}
    evaluate(model(), tokenizer(), ["passkey", "needle"], [400, 500], arms=arms, **asked).save(tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())
    for n, row in enumerate(result["cells"]):
        row["mean"], row["mean_low"], row["mean_high"] = n / 100, 0.25, 0.5
    for row in result["rows"]:
        row["cache_bytes"] = {"dense": 3 << 20}.get(row["arm"], 1 << 20) if row["length"] == 500 else 1 << 40
    header, lines = tables.quality(result)
    asked = [f"{task}, {length}: written; ranked" for task in ("passkey", "needle") for length in (400, 500)]
    assert header == ("Cache", "MiB at 500", *asked)
    assert [line[0] for line in lines] == ["dense", "sink cache(budget=64)"]
    assert [line[1] for line in lines] == ["3", "1"]
    order = [(cell["task"], cell["length"], cell["metric"], cell["arm"]) for cell in result["cells"]]
    place = {metric: order.index(("needle", 500, metric, "dense")) for metric in ("generate", "rank")}
    assert lines[0][5] == f"{place['generate']}% (25% to 50%); {place['rank']}%"
    assert tables.provenance(result).startswith("tiny, 4 samples a cell, ")
