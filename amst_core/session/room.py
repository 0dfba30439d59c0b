"""Waiting for room, or for what is to come: threads sleep, and whoever must not block is called once instead."""

from __future__ import annotations

import threading
from collections.abc import Callable


class NotYet(Exception):
    """There is no room, or nothing there, now; the callback that was given is called once that may have changed."""


class Room(threading.Condition):
    """A condition that also tells those who do not wait on a thread.

    ``notify_all`` calls each watcher once, with the lock held: it must be quick, and take no lock of the session.
    """

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self._watchers: list[Callable[[], None]] = []

    def wait_or_watch(self, when_room: Callable[[], None] | None, timeout: float | None = None) -> None:
        """Wait (lock held); with ``when_room`` have that called instead, and raise `NotYet`."""
        if when_room is None:
            self.wait(timeout)
            return
        self._watchers.append(when_room)
        raise NotYet

    def unwatch(self, when_room: Callable[[], None]) -> None:
        """Do not call it any more, if it has not been (lock held)."""
        if when_room in self._watchers:
            self._watchers.remove(when_room)

    def notify_all(self) -> None:
        super().notify_all()
        if self._watchers:
            watchers, self._watchers = self._watchers, []
            for watcher in watchers:
                watcher()
