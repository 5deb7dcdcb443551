"""The file of a result: written whole after every row, grown by later runs, its rows always in one order.

All that knows of several runs in one result is here: which may stand together, whose row a row replaces, where it goes,
and that a row of another commit than the result's names its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.difference import difference
from ..core.disk import replacing

Row = dict[str, Any]
Result = dict[str, Any]

SAME = ("format", "gpu", "torch", "triton", "transformers", "lcpatch", "geometry")
"""What two results share whose rows may stand in one table."""
WHAT = ("part", "task", "arm", "batch", "length")
"""The columns that say what a row measured; the others say what came out."""
LACKS = "needs "
"""How the reason of a row begins whose arm lacks a package: it measured nothing."""


class Record:
    """A result's file, written after every row: a run that dies leaves what it measured.

    Args:
        path: the file; None: nothing is written.
        place: a row's place among the others, as a sort key, for rows as dictionaries; None: as measured.
        append: keep what the file holds and this run does not measure; only with `place`.
        facts: what `SAME` compares, of this run.

    Raises:
        ValueError: `append` without a file, or to what is no result, one of another benchmark, or one that was measured
            elsewhere, with other packages, or of another model.
        OSError: the file cannot be written. Both are said before anything is measured.
    """

    def __init__(
        self,
        path: Path | None,
        place: Callable[[Row], Any] | None = None,
        append: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._place, self._earlier = path, place, None
        self.is_written = False
        if path is None:
            if append:
                raise ValueError("--append keeps what a file holds: give that file as --out")
            return
        if append and path.exists():
            self._earlier = read(path)
            _check(self._earlier, path, place, facts or {})
        _try(path)

    def keep(self, result: Result) -> None:
        """Write `result`, as far as it is there."""
        if self._path is None:
            return
        if self._earlier is not None:
            result = with_earlier(result, self._earlier)
        if self._place is not None:
            result = {**result, "rows": sorted(result["rows"], key=self._place)}
        write(result, self._path)
        self.is_written = True


def with_earlier(result: Result, earlier: Result) -> Result:
    """`result` with what an earlier one measured and it did not; rows of another commit name theirs.

    A row takes the place of the one that measured the same, but for one whose arm lacks a package.
    """
    grown = dict(result)
    for name in ("rows", "scores"):
        if name not in earlier:
            continue
        old = dict(_named(earlier[name]))
        if earlier["commit"] != result["commit"]:
            old = {what: {"commit": earlier["commit"], **row} for what, row in old.items()}
        new = dict(_named(result.get(name, [])))
        idle = [what for what, row in new.items() if _lacks(row) and what in old and not _lacks(old[what])]
        grown[name] = list({**old, **new, **{what: old[what] for what in idle}}.values())
    if "peers" in earlier:
        grown["peers"] = {name: found or earlier["peers"].get(name) for name, found in result["peers"].items()}
    return grown


def commits_of(result: Result) -> list[str]:
    """The commits of a result's rows; of what was measured outside of a checkout "unknown"."""
    return sorted({row.get("commit", result["commit"]) or "unknown" for row in result["rows"]})


def read(path: Path) -> Result:
    """The result in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result of `lcpatch bench`: {error}") from error
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a result of `lcpatch bench`: it has no list of rows")
    return result


def write(result: Result, path: Path) -> None:
    """Write `result` as JSON, atomically: a run that dies leaves no half file."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _named(rows: Iterable[Row]) -> Iterable[tuple[tuple[Any, ...], Row]]:
    """Rows by what they measured; of several alike (draws) the first, the second, …"""
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        what = tuple(row.get(name) for name in WHAT)
        yield (*what, seen[what]), row
        seen[what] += 1


def _lacks(row: Row) -> bool:
    return (row.get("why") or "").startswith(LACKS)


def _check(earlier: Result, path: Path, place: Callable[[Row], Any], facts: Mapping[str, Any]) -> None:
    ours = {name: facts[name] for name in SAME if name in facts}
    if different := difference({name: earlier.get(name) for name in ours}, ours):
        name, theirs, mine = different
        raise ValueError(
            f"--append: {path} has {name} {theirs!r}, this run {mine!r}: rows of both would not compare; give another "
            "--out"
        )
    for row in earlier["rows"]:
        try:
            place(row)
        except KeyError as error:
            raise ValueError(f"--append: {path} has a row without {error}: it is of another benchmark") from error


def _try(path: Path) -> None:
    """Now, rather than when hours of work are to be written."""
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.touch()
    partial.unlink(missing_ok=True)  # another rank of this run tries the same
