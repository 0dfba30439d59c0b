"""Threads of a session for what may wait for a disk."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Runs work in order on a worker thread, and what reads whole files on another beside it.

    Threads are started when they are needed first. ``on_crash`` is told of an exception that work did not expect.
    """

    def __init__(self, *, on_crash: Callable[[Exception], None]) -> None:
        self._on_crash = on_crash
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._aside: deque[Callable[[], None]] = deque()
        self._reader_runs = False

    def later(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the worker, behind what was given before; once closed, here and now."""
        with self._lock:
            if not self._closed:
                if self._worker is None:
                    self._worker = threading.Thread(target=self._run_worker, name="amst-worker", daemon=True)
                    self._worker.start()
                self._queue.put(work)
                return
        work()

    def aside(self, work: Callable[[], None]) -> None:
        """Run ``work`` beside the worker, one at a time; for what reads whole files."""
        with self._lock:
            self._aside.append(work)
            begin = not self._reader_runs
            self._reader_runs = True
        if begin:
            threading.Thread(target=self._run_reader, name="amst-reader", daemon=True).start()

    def close(self) -> None:
        """Let the worker end when it has done what it was given; may be called on it."""
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def _run_worker(self) -> None:
        while (work := self._queue.get()) is not None:
            self._guarded(work)

    def _run_reader(self) -> None:
        while True:
            with self._lock:
                if not self._aside:
                    self._reader_runs = False
                    return
                work = self._aside.popleft()
            self._guarded(work)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as err:
            self._on_crash(err)
