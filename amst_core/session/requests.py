"""Questions this side has asked its peer and waits to hear about."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from copy import copy

from ..errors import AmstError, CancelledError, DeadlineError, error_from_kind
from ..wire.fields import AttributeValue
from ..wire.messages import Reply, Request
from .core import Acceptor, SessionCore
from .tickets import guarded


class PendingRequest:
    """One request under way."""

    def __init__(self, core: SessionCore, number: int) -> None:
        self._core = core
        self.number = number
        self._done = threading.Event()
        self._reply: Reply | None = None
        self._error: AmstError | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def wait(self, timeout: float | None = None) -> Mapping[str, AttributeValue]:
        """The reply's attributes.

        Raises:
            AmstError: the peer refused, or the session ended.
            CancelledError: it was given up.
            DeadlineError: no reply within ``timeout`` seconds.
        """
        if not self._done.wait(timeout):
            raise self.late(timeout)
        if self._error is not None:
            raise copy(self._error)
        assert self._reply is not None, "done without a reply or an error"
        if self._reply.kind:
            raise error_from_kind(self._reply.kind, self._reply.message, peer=self._core.peer)
        return self._reply.attributes

    def late(self, timeout: float | None) -> DeadlineError:
        """What `wait` raises when there is no reply after ``timeout`` seconds."""
        return DeadlineError(f"{self._core.peer} did not answer within {timeout} s", peer=self._core.peer)

    def answered_within(self, timeout: float) -> bool:
        """Wait for the reply; false when there is none after ``timeout`` seconds."""
        return self._done.wait(timeout)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once on completion, at once when that has been; it must return quickly."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        guarded(callback)

    def cancel(self) -> None:
        """Wait for the reply no more; the peer does what it was asked to all the same."""
        self.complete(None, CancelledError("nobody waits for the answer any more"))

    def complete(self, reply: Reply | None, error: AmstError | None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self._reply, self._error = reply, error
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            guarded(callback)


class Requests:
    """Every request of one session that waits for its reply. Thread-safe."""

    def __init__(self, core: SessionCore) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, PendingRequest] = {}
        self._ended: AmstError | None = None
        self.list_turn = threading.Lock()
        """Held while a page of a list is asked for: a peer answers few at once, and says busy to more."""

    def ask(
        self, operation: str, attributes: Mapping[str, AttributeValue], *, acceptor: Acceptor | None = None
    ) -> PendingRequest:
        """Send a request; ``acceptor`` decides about the transfers that answer it."""
        with self._lock:
            if self._ended is not None:
                raise copy(self._ended)
            pending = PendingRequest(self._core, next(self._numbers))
            self._pending[pending.number] = pending
        if acceptor is not None:
            self._core.accept_request(pending.number, acceptor)
        self._core.tell(Request(pending.number, operation, attributes))
        return pending

    def replied(self, reply: Reply) -> None:
        """A reply arrived; one that nobody waits for is ignored (its request was given up)."""
        with self._lock:
            pending = self._pending.pop(reply.request, None)
        self._core.accept_request(reply.request, None)
        if pending is not None:
            pending.complete(reply, None)

    def end(self, error: AmstError) -> None:
        """The session has ended."""
        with self._lock:
            self._ended = error
            pending, self._pending = list(self._pending.values()), {}
        for request in pending:
            request.complete(None, error)


