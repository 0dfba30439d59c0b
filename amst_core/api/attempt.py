"""An attempt to open a session, which another thread may give up."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ..errors import AmstError, CancelledError


class Attempt:
    """Give it to `amst_core.connect`, for one call, and end that from any other thread.

    Looking up a name is the one thing that cannot be interrupted; nothing is opened behind it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = False
        self._over = False
        self._abort: Callable[[], None] | None = None
        self._socket: socket.socket | None = None

    def give_up(self) -> None:
        """Have `connect` raise `CancelledError` and leave nothing open; no effect once it returned. Never blocks."""
        with self._lock:
            if self._over:
                return
            self._given_up = True
            if self._abort is not None:
                self._abort()

    # ---- for `connect` ---------------------------------------------------------------------------

    def may_abort(self, abort: Callable[[], None]) -> None:
        """What giving up calls from now on, and nothing else; raises `CancelledError` when it has been given up."""
        with self._lock:
            if self._given_up:
                raise CancelledError("the attempt to connect was given up")
            self._abort = abort
            self._drop_socket()

    def may_shut(self, sock: socket.socket) -> None:
        """Giving up shuts this connection, or the attempt to make it; as `may_abort`."""
        own = sock.dup()  # `sock` may be closed, and its number used again, at the wrong moment
        try:
            self.may_abort(lambda: _shut(own))
        except BaseException:
            own.close()
            raise
        self._socket = own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            self._abort = None
            self._drop_socket()
        if self._given_up and (error is None or isinstance(error, AmstError)):
            raise CancelledError("the attempt to connect was given up") from error

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may not be connected yet, or any more
        sock.shutdown(socket.SHUT_RDWR)
