"""Every example runs as it stands, and every method has one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lcpatch
from lcpatch.caches import caches

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs(example: Path):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_every_method_has_one():
    assert set(lcpatch.methods()) <= {example.stem for example in EXAMPLES}


def test_every_cache_has_one():
    assert {f"{name}_cache" for name in caches.all()} <= {example.stem for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(example: Path):
    assert len(example.read_text().splitlines()) <= 60
