"""Pipes: ordered bytes of unknown length from one side to the other, over all lanes at once."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import ClosedError, DeadlineError
from ..process import Foreign, own
from ..wire.messages import PIPE, Open
from .core import SessionCore
from .ordered import OrderedSink, OrderedSource
from .room import Room
from .tickets import Ticket

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class PipeWriter(io.RawIOBase):
    """The end that writes; made by `Session.open_pipe`.

    All methods may be called from any thread; writes of several threads do not mix. As a context manager it closes
    at the end of the block, and gives the pipe up when the block raises.
    """

    def __init__(self, core: SessionCore, channel: str, when_room: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.channel = channel
        self._writing = threading.Lock()
        self._source = OrderedSource(core)
        self._core = core
        self._ticket = core.open(
            PIPE, self._source, size=None, flow=("pipe", channel), channel=channel, when_room=when_room
        )
        self._foreign: Foreign | None = None
        own(self)

    def forked(self, foreign: Foreign) -> None:
        """This is a forked child's copy: refuse to work."""
        self._foreign = foreign
        self._source = self._core = self._ticket = foreign  # type: ignore[assignment]

    def writable(self) -> bool:
        return True

    @property
    def transfer(self) -> int:
        """The pipe's number, as in ``error.delivery``."""
        return self._ticket.transfer

    @property
    def acknowledged(self) -> int:
        """Bytes the peer holds, verified."""
        return self._ticket.acknowledged

    def write(self, data: ReadableBuffer, /) -> int:
        """Take all of ``data``; waits while this side's memory has no room, because the peer does not read.

        Large ``bytes`` are sent from where they are, all else is copied first; where `limits.memory` has no room for
        a copy, this returns when the peer has what was written.

        Raises:
            ClosedError: the pipe was closed or given up, by whichever side.
            AmstError: the session has ended.
        """
        view = memoryview(data)
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        view = view.cast("B")
        with self._writing:
            self._require_open()
            self._source.write(view, is_steady=isinstance(data, bytes))
        return view.nbytes

    def write_some(
        self, view: memoryview, *, is_steady: bool, when_room: Callable[[], None]
    ) -> tuple[int, int | None]:
        """For `aio`: `OrderedSource.write_some`."""
        self._require_open()
        return self._source.write_some(view, is_steady=is_steady, when_room=when_room)

    def await_release(self, end: int, *, when_room: Callable[[], None]) -> None:
        """For `aio`: `OrderedSource.await_release`."""
        self._source.await_release(end, when_room=when_room)

    def end(self) -> Ticket:
        """For `aio`: what was written is all; when the ticket has completed, `close` does not wait."""
        self._source.end()
        return self._ticket

    @property
    def ticket(self) -> Ticket:
        """Completes when the peer holds all of it, or when it was given up."""
        return self._ticket

    def flush(self) -> None:
        """Have everything that was written sent now; without it a little waits until what is on its way has arrived."""
        if not self.closed and self._foreign is None:
            self._source.flush()

    def close(self, timeout: float | None = None) -> None:
        """End the pipe, and wait until the peer holds all of it, verified. Idempotent.

        Raises:
            DeadlineError: not within ``timeout`` seconds; it goes on, and ``close`` may be called again.
            AmstError: the peer closed it before, or the session ended: what was written may not have arrived.
        """
        if self.closed:
            return
        if self._foreign is not None:
            super().close()  # the parent's pipe is not ours to end
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._writing.acquire(timeout=-1 if timeout is None else timeout):
            raise DeadlineError(f"a write was still under way after {timeout} s", peer=self._core.peer)
        try:
            self._source.end()
        finally:
            self._writing.release()
        try:
            self._ticket.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            if self._ticket.done:
                super().close()

    def abort(self) -> None:
        """Give the pipe up: its reader gets an error. Never blocks; nothing once it is closed."""
        if self.closed or self._foreign is not None:
            return
        self._ticket.cancel()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        """A writer that was forgotten has not said that this was all."""
        ticket = getattr(self, "_ticket", None)
        if ticket is not None and self._foreign is None and not ticket.done:
            self._core.soon(ticket.cancel)

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedError("this side has closed the pipe or given it up", peer=self._core.peer)


class PipeReader(io.RawIOBase):
    """The end that reads; made by `Session.accept_pipe`. All methods may be called from any thread.

    ``timeout``: how many seconds a read waits for the next bytes before it raises `DeadlineError`; None: for ever.
    """

    def __init__(self, core: SessionCore, sink: OrderedSink, channel: str) -> None:
        super().__init__()
        self.channel = channel
        self.timeout: float | None = None
        self._reading = threading.Lock()
        self._sink = sink
        self._core = core
        self._foreign: Foreign | None = None
        own(self)

    def forked(self, foreign: Foreign) -> None:
        """This is a forked child's copy: refuse to work."""
        self._foreign = foreign
        self._sink = self._core = foreign  # type: ignore[assignment]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill ``buffer`` with the next bytes, at least one; 0 at the end, when all had come and was verified.

        Raises:
            CancelledError: the writer gave the pipe up; nothing more of it can be read.
            ClosedError: this side has closed it.
            DeadlineError: nothing came within `timeout`.
            AmstError: the session ended before all of it had come.
        """
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            return 0
        with self._reading:
            ready = self._ready()
            size = min(view.nbytes, ready.nbytes)
            view[:size] = ready[:size]
            self._sink.consumed(size)
        return size

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, at most ``size`` of them; negative or None: all up to the end. Otherwise as `readinto`."""
        if size is None or size < 0:
            return self.readall()
        with self._reading:
            data = bytes(self._ready()[:size]) if size else b""
            self._sink.consumed(len(data))
        return data

    def readall(self) -> bytes:
        """Everything up to the end; as `readinto`."""
        parts = bytearray()
        with self._reading:
            while ready := self._ready():
                parts += ready
                self._sink.consumed(ready.nbytes)
        return bytes(parts)

    def read_some(self, size: int, *, when_room: Callable[[], None]) -> bytes:
        """`read`, without waiting.

        Raises:
            NotYet: nothing is there, and ``when_room`` will be called when there is.
        """
        with self._reading:
            data = bytes(self._ready(when_room)[:size])
            self._sink.consumed(len(data))
        return data

    @property
    def changed(self) -> Room:
        """Notified when there is more to read, or will be no more."""
        return self._sink.changed

    def close(self) -> None:
        """Read no more. A writer that has not ended yet gets a `ClosedError`. Idempotent, never blocks."""
        if not self.closed and self._foreign is None:
            self._sink.close()
        super().close()

    def __del__(self) -> None:
        sink = getattr(self, "_sink", None)
        if sink is not None and self._foreign is None and not self.closed:
            sink.drop()

    def _ready(self, when_ready: Callable[[], None] | None = None) -> memoryview:
        if self.closed:
            raise ClosedError("this side has closed the pipe", peer=self._core.peer)
        return self._sink.ready(self.timeout, when_ready=when_ready)


class Pipes:
    """The pipes of one session that the peer has opened and nobody has accepted yet.

    They count among the transfers that the peer may have open, each with the credit that came with its OPEN, so their
    number and memory are bounded; and the peer opens no more of a channel than leaves room for others.
    """

    def __init__(self, core: SessionCore) -> None:
        self._core = core
        self._waiting: dict[str, deque[OrderedSink]] = {}
        self.arrived = Room(core.lock)
        core.accept_kind(PIPE, self._offered)

    def open(self, channel: str, *, when_room: Callable[[], None] | None = None) -> PipeWriter:
        """Begin a pipe, waiting while the peer takes no more transfers; see `SessionCore.open`."""
        return PipeWriter(self._core, channel, when_room)

    def accept(
        self, channel: str, timeout: float | None, *, when_room: Callable[[], None] | None = None
    ) -> PipeReader:
        """The next pipe of ``channel``, waiting for it.

        Raises:
            NotYet: there is none now, and ``when_room`` will be called (`Room`) instead of waiting.
            DeadlineError: none within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._core.lock:
            while True:
                self._core.check_open_locked()
                waiting = self._waiting.get(channel)
                if waiting:
                    sink = waiting[0]
                    self._forget(channel, sink)
                    sink.open_window_locked()
                    self._core.wake_locked()
                    break
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineError(f"no pipe on channel {channel!r} within {timeout} s", peer=self._core.peer)
                self.arrived.wait_or_watch(when_room, left)
        return PipeReader(self._core, sink, channel)

    def end(self) -> None:
        """The session has ended: nobody waits any more."""
        with self._core.lock:
            self.arrived.notify_all()

    def _offered(self, opened: Open) -> OrderedSink:
        channel = opened.channel
        sink = OrderedSink(self._core, opened, forget=lambda sink: self._forget(channel, sink))
        self._waiting.setdefault(channel, deque()).append(sink)
        self.arrived.notify_all()
        return sink

    def _forget(self, channel: str, sink: OrderedSink) -> None:
        """It waits no more: it was accepted, or it failed."""
        waiting = self._waiting.get(channel)
        if waiting is not None and sink in waiting:
            waiting.remove(sink)
            if not waiting:
                del self._waiting[channel]
