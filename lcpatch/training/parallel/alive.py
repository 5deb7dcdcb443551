"""Which ranks are still there: a thread of each beats in the store that torch.distributed keeps anyway.

A backend's error says at best an address. A process that died, or left with an error, beats no more; one that waits in
a collective or computes for long still does.
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

BEAT = 0.5  # seconds
PATIENCE = 6  # beats missed before a rank counts as gone


class Pulse:
    """Beats until `stop`, and reads the others' beats.

    Args:
        store: a store that all ranks reach; this object's own, since a client answers one request at a time.
        name: keeps several groups' beats apart.
        rank, size: of the group.
    """

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        self._store, self._name, self._rank, self._size = store, name, rank, size
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._count = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, name=f"lcpatch-pulse-{name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
        self._thread.join(timeout=5 * BEAT)

    def who_is_gone(self) -> str:
        """Names the ranks that do not beat, in words; takes up to `PATIENCE` beats."""
        waiting = {rank for rank in range(self._size) if rank != self._rank}
        deadline = time.monotonic() + PATIENCE * BEAT
        try:
            before = {rank: self._read(rank) for rank in waiting}
            while waiting and time.monotonic() < deadline:
                time.sleep(BEAT / 2)
                waiting = {rank for rank in waiting if self._read(rank) == before[rank]}
        except RuntimeError:
            return "the process that keeps torch.distributed's store, often rank 0, is gone"
        if not waiting:
            return "all ranks are alive, so one waits elsewhere or is late"
        if len(waiting) == 1:
            return f"rank {waiting.pop()} is gone"
        return f"ranks {', '.join(map(str, sorted(waiting)))} are gone"

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._beat()
            except RuntimeError:  # the store is gone, with the process that kept it; collectives will say so
                return

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self._store.set(self._key(self._rank), str(self._count))

    def _read(self, rank: int) -> bytes | None:
        with self._lock:
            return self._store.get(self._key(rank)) if self._store.check([self._key(rank)]) else None

    def _key(self, rank: int) -> str:
        return f"lcpatch/{self._name}/{rank}"


def pulse_of(group: dist.ProcessGroup) -> Pulse | None:
    """The pulse of a group's ranks, or None where torch gives no store to beat in."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        store = store.clone() if hasattr(store, "clone") else store
    except (ImportError, RuntimeError, ValueError, NotImplementedError):
        return None
    name = "-".join(str(dist.get_global_rank(group, r)) for r in (0, dist.get_world_size(group) - 1))
    return Pulse(store, name, dist.get_rank(group), dist.get_world_size(group))
