"""Host memory and the file behind it give back what was put in, notice a full disk, and leave nothing behind."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcpatch import LcpatchError
from lcpatch.caches import spill
from lcpatch.caches.arena import Arena
from lcpatch.caches.residents import Residents
from lcpatch.caches.spill import Disk, PageFile

ROOT = Path(__file__).parents[2]
RECORD = 104


def records(first, count):
    """Records that say their number."""
    number = torch.arange(first, first + count)[:, None]
    return ((number * 31 + torch.arange(RECORD)) % 251).to(torch.uint8)


steps = st.lists(st.tuples(st.sampled_from(["append", "read"]), st.integers(0, 90), st.integers(0, 99)), max_size=12)


@settings(max_examples=25)
@example([("append", 0, 0), ("append", 1, 0), ("read", 1, 0)], "file")  # nothing is also a write
@given(steps, st.sampled_from(["memory", "file", "disk", "no host"]))
def test_what_is_read_is_what_was_written(tmp_path_factory, case, kind):
    folder = tmp_path_factory.mktemp("tier")
    store = {
        "memory": lambda: Arena(RECORD, False),
        "file": lambda: PageFile(RECORD, folder),
        "disk": lambda: Disk(RECORD, folder, 20, False),
        "no host": lambda: Disk(RECORD, folder, 0, False),
    }[kind]()
    count = 0
    for what, size, seed in case:
        if what == "append":
            assert store.append(records(count, size)) == count
            count += size
        elif count:
            wanted = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size]
            assert torch.equal(store.read(wanted), records(0, count)[wanted])
    assert list(folder.iterdir()) == [], "the file has no name"


def test_host_memory_is_taken_as_records_come(tmp_path):
    """And no more of it than there is room for: only then some are read from the file."""
    disk, count = Disk(RECORD, tmp_path, 100, False), 0
    assert disk.nbytes()["host"] == 0
    for size in (0, 3, 1, 10, 2, 50, 30, 40, 7):
        disk.append(records(count, size))
        count += size
        assert min(count, 100) <= disk.nbytes()["host"] // RECORD <= min(100, 1.25 * count)
        assert torch.equal(disk.read(torch.arange(count)), records(0, count))
        assert (disk.from_disk == 0) == (count <= 100)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 30), unique=True, max_size=6), max_size=15),
    st.tuples(st.integers(6, 9), st.integers(6, 9)),
)
def test_the_page_used_longest_ago_leaves_first(rounds, slots):
    """No page that has a slot was used before one that has lost its own. The second group sees every other round, and
    a group has as many slots as it may, however many the other has."""
    residents, last = Residents(2, 0), [{}, {}]
    residents.grow(max(slots), torch.tensor(slots))
    residents.reserve(31)
    for n, pages in enumerate(rounds):
        page = torch.full((2, len(pages)), -1)
        page[: 1 + n % 2] = torch.tensor(pages, dtype=torch.int64)
        residents.take(page[None])
        for group in range(1 + n % 2):
            last[group] |= dict.fromkeys(pages, n)
        for group in (0, 1):
            here = set(residents.page_in[group].tolist()) - {-1}
            away = set(last[group]) - here
            assert len(here) == min(slots[group], len(last[group]))
            assert not away or max(last[group][p] for p in away) <= min(last[group][p] for p in here)
            places = residents.page_in[group, 1:].tolist()
            assert all(residents.slot_of[group, 1 + p] == s for s, p in enumerate(places) if p >= 0)
            assert (residents.slot_of[group] >= 0).sum() == len(here)


def test_a_full_disk_is_noticed_before_anything_is_lost(tmp_path, monkeypatch):
    file = PageFile(RECORD, tmp_path)
    file.append(records(0, 5))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LcpatchError, match=r"it is full: \d+ bytes more are wanted, \d+ are free; nothing .* is lost"):
        file.append(records(5, 5))
    assert torch.equal(file.read(torch.arange(5)), records(0, 5))
    monkeypatch.undo()
    assert file.append(records(5, 5)) == 5
    assert torch.equal(file.read(torch.arange(10)), records(0, 10))


def limited(folder, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = PageFile(RECORD, folder)
    file.append(records(0, 10))
    try:
        file.append(records(10, 1000))
    except LcpatchError as error:
        queue.put((str(error), file.read(torch.arange(10)).numpy()))


def test_a_limit_of_the_system_is_such_a_full_disk(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limited, args=(tmp_path, queue))
    process.start()
    message, read = queue.get(timeout=60)
    process.join()
    assert "it is full" in message
    assert np.array_equal(read, records(0, 10).numpy())


def test_a_write_that_fails_later_is_said_when_it_is_needed(tmp_path, monkeypatch):
    file = PageFile(RECORD, tmp_path)

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(spill.os, "pwrite", broken)
    file.append(records(0, 5))
    for _ in range(2):  # who went on would read what was never written
        with pytest.raises(LcpatchError, match=r"could not be written: .*Input/output error; cache\.reset"):
            file.read(torch.arange(2))


def test_a_file_that_shrank_is_noticed(tmp_path):
    file = PageFile(RECORD, tmp_path)
    file.append(records(0, 5))
    file.flush()
    os.truncate(file._file.fileno(), 3 * file.stride)
    assert torch.equal(file.read(torch.arange(3)), records(0, 3))
    with pytest.raises(LcpatchError, match="0 bytes came back where"):
        file.read(torch.tensor([4]))


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LcpatchError, match="no file can be made there"):
        PageFile(RECORD, tmp_path / "file")


@pytest.mark.slow
def test_killed_processes_on_one_folder_leave_nothing_and_disturb_no_one(tmp_path):
    """Two write at a time, one is killed in the middle: the other reads its own, the folder is empty."""
    code = (
        "import sys, torch, numpy as np; from lcpatch.caches.spill import PageFile\n"
        "file = PageFile(104, sys.argv[1]); print('ready', flush=True)\n"
        "while True: file.append(torch.zeros(50, 104, dtype=torch.uint8))\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    file = PageFile(RECORD, tmp_path)
    assert other.stdout.readline() == b"ready\n"
    file.append(records(0, 500))
    other.kill()
    other.wait()
    assert torch.equal(file.read(torch.arange(500)), records(0, 500))
    assert list(tmp_path.iterdir()) == []
