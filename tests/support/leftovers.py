"""Checks that what a test ran left nothing behind: no thread, no descriptor, no surprise in the log."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator


class Snapshot:
    """The threads and descriptors of now."""

    def __init__(self) -> None:
        self._threads, self._descriptors = set(threading.enumerate()), set(_descriptors())

    def left(self) -> tuple[list[str], list[str]]:
        """The threads and descriptors that have come since."""
        return (
            sorted(thread.name for thread in threading.enumerate() if thread not in self._threads),
            sorted(set(_descriptors()) - self._descriptors),
        )


@contextlib.contextmanager
def no_leftovers() -> Iterator[None]:
    """No thread and no descriptor outlives the block by more than moments."""
    before = Snapshot()
    yield
    deadline = time.monotonic() + 10.0
    while any(before.left()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert before.left() == ([], [])


@contextlib.contextmanager
def no_error_logged(containing: str = "") -> Iterator[None]:
    """Nothing with those words is logged as an error: a bug of ours that some caller might not notice."""
    handler = _Errors(containing)
    logger = logging.getLogger("amst")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert handler.found == []


class _Errors(logging.Handler):
    def __init__(self, containing: str) -> None:
        super().__init__(logging.ERROR)
        self._containing = containing
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._containing in record.getMessage():
            self.found.append(self.format(record))


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the one of this listing
            continue
    return found
