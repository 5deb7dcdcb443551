"""Committed results as the README shows them: Markdown tables, and the plot of speed-up and share of the ceiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .record import commits_of

Result = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def attention(result: Result) -> Table:
    """A line per pattern and kernel, a column per length: speed-up over FA2, share of the ceiling of either pass."""
    return _by_length(result, ("pattern", "provider"), ("Pattern", "Kernel"), _attention_cell)


def shapes(result: Result) -> Table:
    """`attention` for several shapes, a line per shape and kernel."""
    return _by_length(
        result, ("shape", "pattern", "provider"), ("Query / KV heads", "Pattern", "Kernel"), _attention_cell
    )


def _attention_cell(row: dict[str, Any]) -> str:
    if row["why"]:
        return row["why"]
    gain = "1" if row["provider"] == "FA2" else _times(row["both_vs_fa2"])
    return f"{gain} ({row['forward_share']:.2f} / {row['backward_share']:.2f})"


def decode(result: Result) -> Table:
    """A line per batch, pattern and kernel, a column per length: milliseconds, share of the bandwidth, speed-up."""

    def cell(row: dict[str, Any]) -> str:
        if row["why"]:
            return row["why"]
        gain = "1" if row["vs_fa2"] is None else _times(row["vs_fa2"])
        return f"{row['ms']:.3f} ms ({row['bandwidth_share']:.2f}), {gain}"

    return _by_length(result, ("batch", "pattern", "provider"), ("Batch", "Pattern", "Kernel"), cell)


def _by_length(
    result: Result, keys: tuple[str, ...], names: tuple[str, ...], cell: Callable[[dict[str, Any]], str]
) -> Table:
    lengths = sorted({row["length"] for row in result["rows"]})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in result["rows"]:
        lines.setdefault(tuple(str(row[key]) for key in keys), {})[row["length"]] = cell(row)
    header = (*names, *(f"{_tokens(n)} tokens" for n in lengths))
    return header, [(*line, *(cells.get(n, "") for n in lengths)) for line, cells in lines.items()]


def model(result: Result) -> Table:
    """A whole model, a line per task and arm."""
    header = ("Task", "Tokens", "Attention", "Seconds", "Peak GiB", "Cache GiB", "Speed-up")
    rows = []
    for row in result["rows"]:
        start = (row["task"], _tokens(row["length"]), row["arm"])
        if row["why"]:
            rows.append((*start, row["why"], "-", "-", "-"))
            continue
        cache = "" if row["cache_gib"] is None else f"{row['cache_gib']:.2f}"
        gain = "1" if row["vs_dense"] is None else _times(row["vs_dense"])
        rows.append((*start, f"{row['seconds']:.3f}", f"{row['peak_gib']:.1f}", cache, gain))
    return header, rows


def parallel(result: Result) -> Table:
    """Bytes of context parallelism, a line per layer and strategy: MiB a rank sends, and torch's ring over that."""
    header = ("Layer", "Tokens", "Ranks", "Strategy", "Layout", "Forward, MiB", "Backward, MiB", "torch's ring sends")

    def mib(mean: float, most: int) -> str:
        return f"{mean / 2**20:.1f} ({most / 2**20:.1f})"

    rows = [
        (
            *(row["layer"], _tokens(row["length"]), str(row["ranks"]), row["strategy"], row["layout"]),
            *(mib(row["forward"], row["forward_most"]), mib(row["backward"], row["backward_most"])),
            _times(row["fewer_than_ring"]),
        )
        for row in result["rows"]
    ]
    return header, rows


def cache(result: Result) -> Table:
    """Caches of a whole model, a line per task and arm."""
    header = ("Batch", "Tokens", "Cache", "Prefill s", "Peak GiB", "Cache GiB", "ms a token", "Floor ms")
    rows = []
    for row in result["rows"]:
        start = (str(row["batch"]), _tokens(row["length"]), row["arm"])
        if row["why"]:
            rows.append((*start, row["why"], "-", "-", "-", "-"))
            continue
        sizes = ("" if row[name] is None else f"{row[name]:.1f}" for name in ("peak_gib", "cache_gib", "decode_ms"))
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.1f}"
        rows.append((*start, f"{row['prefill_s']:.2f}", *sizes, floor))
    return header, rows


def training(result: Result) -> Table:
    """Steps of a long text, a line per part and arm."""
    header = ("Part", "Arm", "Tokens", "Seconds", "Peak GiB", "")
    rows = []
    for row in result["rows"]:
        start = (row["part"], row["arm"], _tokens(row["length"]))
        if row["why"]:
            rows.append((*start, row["why"], "-", "-"))
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} {row['unit']}"
        rows.append((*start, f"{row['seconds']:.2f}", peak, ratio))
    return header, rows


def multi(result: Result) -> Table:
    """Time of context parallelism on real GPUs, a line per layer, strategy and layout, a column per length.

    Milliseconds of the slowest rank, forward and backward, and the speed-up over one GPU; bold is what the cost model
    chose.
    """

    def cell(row: dict[str, Any]) -> str:
        if row["why"]:
            return row["why"]
        gain = "1" if row["speedup"] is None else f"{row['speedup']:.2f}×"
        gain = f"**{gain}**" if row["chosen"] else gain
        return f"{row['forward_ms']:.1f} + {row['backward_ms']:.1f} ms, {gain}"

    return _by_length(result, ("layer", "strategy", "layout"), ("Layer", "Strategy", "Layout"), cell)


def steps(result: Result) -> Table:
    """Training steps of a whole model on one GPU and on several, a line per attention and number of GPUs."""
    header = ("Attention", "Tokens", "GPUs", "Seconds", "Peak GiB of a GPU", "Speed-up", "Strategy")
    rows = []
    for row in result["rows"]:
        start = (row["arm"], _tokens(row["length"]), str(row["ranks"]))
        if row["why"]:
            rows.append((*start, row["why"], "-", "-", "-"))
            continue
        gain = "1" if row["ranks"] == 1 else "-" if row["speedup"] is None else f"{row['speedup']:.2f}×"
        rows.append((*start, f"{row['seconds']:.2f}", f"{row['peak_gib']:.1f}", gain, row["strategy"]))
    return header, rows


def quality(result: Result) -> Table:
    """A report of `lcpatch eval --score both`, a line per arm: what its cache held, and answers by task and length."""
    cells = {(cell["task"], cell["length"], cell["metric"], cell["arm"]): cell for cell in result["cells"]}
    columns = list(dict.fromkeys((task, length) for task, length, *_ in cells))
    longest = max(length for _, length in columns)

    def held(arm: str) -> str:
        rows = [row["cache_bytes"] for row in result["rows"] if (row["arm"], row["length"]) == (arm, longest)]
        return f"{sum(rows) / len(rows) / 2**20:.0f}"

    def answers(arm: str, column: tuple[str, int]) -> str:
        written, ranked = (cells[*column, metric, arm] for metric in ("generate", "rank"))
        low, high = written["mean_low"], written["mean_high"]
        return f"{written['mean']:.0%} ({low:.0%} to {high:.0%}); {ranked['mean']:.0%}"

    asked = (f"{task}, {_tokens(length)}: written; ranked" for task, length in columns)
    header = ("Cache", f"MiB at {_tokens(longest)}", *asked)
    return header, [(arm, held(arm), *(answers(arm, column) for column in columns)) for arm in result["arms"]]


KINDS: dict[str, Callable[[Result], Table]] = {
    "attention": attention,
    "shapes": shapes,
    "decode": decode,
    "model": model,
    "parallel": parallel,
    "multi": multi,
    "steps": steps,
    "cache": cache,
    "training": training,
    "quality": quality,
}
"""Kind of result -> its table. A result file's name starts with its kind."""


def provenance(result: Result) -> str:
    """One line: where and with what a result was measured, or that it was not."""
    if result.get("counted"):
        return f"Counted, not timed: {result['counted']}; commit {result['commit']}"
    if "cells" in result:  # a report of `lcpatch eval`
        made = result["versions"]
        versions = [f"{name} {made[name]}" for name in ("torch", "transformers", "lcpatch")]
        samples = max(cell["samples"] for cell in result["cells"])
        return ", ".join([result["run"]["model"], f"{samples} samples a cell", made["device"], *versions])
    commits = commits_of(result)
    parts = [result["gpu"], f"torch {result['torch']}", f"triton {result['triton']}"]
    parts.append(f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}")
    if "ranks" in result:
        parts[0] = f"{result['ranks']} × {parts[0]}"
    if "matmul_tflops" in result:
        parts.insert(1, f"bf16 matmul {result['matmul_tflops']:.0f} TFLOP/s")
    if "copy_gb_per_s" in result:
        parts.insert(1, f"copy {result['copy_gb_per_s']:.0f} GB/s")
    return ", ".join(parts)


def plot(result: Result, path: Path) -> None:
    """Speed-up over FlashAttention-2 and share of the matmul rate against length, of an attention result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels = [
        ("both_vs_fa2", "forward + backward: speed-up over FlashAttention-2"),
        ("forward_share", "forward: share of the bf16 matmul rate"),
        ("backward_share", "backward: share of the bf16 matmul rate"),
    ]
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if not row["why"] and not row["pattern"].startswith("causal"):
            lines.setdefault((row["pattern"], row["provider"]), []).append(row)
    patterns = list(dict.fromkeys(pattern for pattern, _ in lines))
    for axis, (field, title) in zip(axes, panels, strict=True):
        for (pattern, provider), rows in lines.items():
            style = {"lcpatch": "-o", "Flex": "--x"}.get(provider, ":s")
            label = pattern if provider == "lcpatch" else f"{pattern}, {provider}"
            points = [(row["length"], row[field]) for row in rows]
            axis.plot(*zip(*points, strict=True), style, color=f"C{patterns.index(pattern)}", label=label, markersize=5)
        axis.set_xscale("log", base=2)
        lengths = sorted({row["length"] for row in result["rows"]})
        axis.set_xticks(lengths, [_tokens(n) for n in lengths])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7, ncols=2)
    figure.suptitle(provenance(result), fontsize=9, color="0.4")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}×"
