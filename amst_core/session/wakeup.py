"""Waking a thread that polls, from anywhere."""

from __future__ import annotations

import os
import threading


class Wakeup:
    """A descriptor that one thread polls and any code may make readable, until it is closed.

    `set` may run inside the garbage collector, in a thread that holds any lock: it takes only a lock of its
    own, under which nothing else happens. Without that, a late `set` could write to whatever got the number.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._gate = threading.RLock()  # re-entrant: the collector may interrupt the thread inside

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        """Make the descriptor readable; nothing once closed."""
        with self._gate:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make it unreadable again; for the thread that polls, when it was readable."""
        os.eventfd_read(self._fd)

    def close(self) -> None:
        """Give the descriptor up; nobody polls it any more. Idempotent."""
        with self._gate:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
