"""What a sender holds while its transfer is under way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from copy import copy

from ..errors import AmstError, DeadlineError

_log = logging.getLogger("amst.session")


class Ticket:
    """One outgoing transfer. Completes when the peer's engine holds it whole and verified, or with an error.

    Thread-safe. ``size`` is the transfer's bytes.
    """

    def __init__(self, size: int, *, cancel: Callable[[Ticket], None]) -> None:
        self.size = size
        self.transfer = 0
        self._cancel = cancel
        self._done = threading.Event()
        self._error: AmstError | None = None
        self._acknowledged = 0
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Ticket], None]] = []
        self.on_progress: Callable[[int, int], None] | None = None

    @property
    def done(self) -> bool:
        """Completed, either way."""
        return self._done.is_set()

    @property
    def error(self) -> AmstError | None:
        """Why it failed; None while under way and after success."""
        return self._error

    @property
    def acknowledged(self) -> int:
        """Bytes the peer holds, verified."""
        return self._acknowledged

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the transfer is delivered.

        Raises:
            DeadlineError: not yet, after ``timeout`` seconds; it goes on.
            AmstError: it failed, and why.
        """
        if not self._done.wait(timeout):
            raise self.late(timeout)
        if self._error is not None:
            raise copy(self._error)

    def late(self, timeout: float | None) -> DeadlineError:
        """What `wait` raises when it is not delivered after ``timeout`` seconds."""
        return DeadlineError(f"not delivered within {timeout} s ({self._acknowledged} of {self.size} bytes are)")

    def cancel(self) -> None:
        """Give the transfer up: the peer drops what it has of it. No effect once completed."""
        self._cancel(self)

    def add_done_callback(self, callback: Callable[[Ticket], None]) -> None:
        """Have ``callback(ticket)`` called once on completion: at once when that has been.

        It runs on a thread of the session and must return quickly.
        """
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        guarded(callback, self)

    # ---- for the session --------------------------------------------------------------------

    def record(self, acknowledged: int) -> None:
        """The peer holds so many bytes (quick; the session's lock held)."""
        self._acknowledged = acknowledged

    def settle(self) -> None:
        """Wait until it has completed, either way; cancelled if that is interrupted."""
        try:
            self._done.wait()
        except BaseException:
            self.cancel()
            raise

    def report(self, acknowledged: int) -> None:
        """Tell the application so (no lock held)."""
        if self.on_progress is not None and not self._done.is_set():
            guarded(self.on_progress, acknowledged, self.size)

    def complete(self, error: AmstError | None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self._error = error
            if error is None:
                self._acknowledged = self.size
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        if self.on_progress is not None and error is None:
            guarded(self.on_progress, self.size, self.size)
        for callback in callbacks:
            guarded(callback, self)


def guarded(callback: Callable[..., None], *args: object) -> None:
    """Call it: what the application's code raises on a thread of the session concerns neither."""
    try:
        callback(*args)
    except Exception:
        _log.exception("a callback of the application raised")
