"""Fetching that goes on beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor


class Ahead:
    """One fetch at a time: on a stream of its own, and what waits for a disk on a thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "lcpatch-prefetch")
        self._landing: Callable[[], None] | None = None

    @property
    def under_way(self) -> bool:
        return self._landing is not None

    def on_stream(self, fetch: Callable[[], None]) -> None:
        """Let the device fetch, once what it was asked for before is done."""
        if self._stream is None:
            fetch()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            fetch()
        self._landing = partial(self._wait, self._stream.record_event(), fetch)

    def on_thread(self, fetch: Callable[[], Tensor], place: Callable[[Tensor], None]) -> None:
        """Let a thread fetch, from what does not change meanwhile; `place` is called when it lands."""
        future = self._pool.submit(self._fetched, fetch, torch.is_inference_mode_enabled())

        def landing() -> None:
            found, event = future.result()
            if event is not None:
                self._wait(event)
                found.record_stream(torch.cuda.current_stream(found.device))
            place(found)

        self._landing = landing

    def land(self) -> None:
        """Let what was fetched be where it belongs, before anything reads or moves that."""
        landing, self._landing = self._landing, None
        if landing is not None:
            landing()

    def _wait(self, event: torch.cuda.Event, fetch: Callable[[], None] | None = None) -> None:
        """Let the stream that asks wait. What `fetch` holds must live until then: it reads that on another stream."""
        torch.cuda.current_stream(self._stream.device).wait_event(event)

    def _fetched(self, fetch: Callable[[], Tensor], inference: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        with torch.inference_mode(inference), torch.cuda.stream(self._stream):
            found = fetch()
            return found, None if self._stream is None else self._stream.record_event()
