"""A session as coroutines see it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from copy import copy
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from ..errors import AmstError, ClosedError, DeadlineError, UsageError
from ..files.entries import Entry, WalkError
from ..interfaces import Mode, SessionMetrics, StreamHealth
from ..session.background import Background
from ..session.copying import Stop
from ..session.core import SessionCore
from ..session.listing import Pages
from ..session.mode import ModeState
from ..session.requests import PendingRequest
from ..session.room import NotYet
from ..session.session import (
    CLOSE_TIMEOUT_S,
    DRAIN_LOOK_S,
    HEALTH_TIMEOUT_S,
    MODE_TIMEOUT_S,
    HealthReport,
    SessionReport,
    check_channel,
    remote_path,
)
from ..session.session import Session as BlockingSession
from ..wire import requests as ops
from .pipes import PipeReader, PipeWriter
from .room import Try, when_room
from .threads import in_thread, own_thread
from .tickets import Ticket
from .waking import Once, post

_log = logging.getLogger("amst.aio")

Progress = Callable[[int, int | None], object]
"""Told ``(bytes_done, bytes_total)``; the total is None until it is known."""

T = TypeVar("T")


class Session:
    """Reliable, exactly-once delivery between two peers. Made by `connect` and `listen`.

    Belongs to the event loop it was made in; there any number of coroutines may use it at once. After the session has
    ended, each method raises the error it ended with.
    """

    def __init__(self, inner: BlockingSession) -> None:
        self._inner = inner
        self._loop = asyncio.get_running_loop()
        self._turns: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = weakref.WeakValueDictionary()
        self._errands = Background(on_crash=lambda err: _log.error("unexpected error", exc_info=err))
        self._list_turn = asyncio.Lock()  # a peer answers few pages of lists at once, and says busy to more
        self._closing = False
        self._ended = Once()
        inner.add_end_callback(self._ended.tell)

    @property
    def _core(self) -> SessionCore:
        return self._inner.core  # in a forked child it is another one

    @property
    def id(self) -> str:
        """The session's name, the same on both sides."""
        return self._inner.id

    @property
    def peer(self) -> str:
        """The other side."""
        return self._inner.peer

    @property
    def error(self) -> AmstError | None:
        """What the session ended with; None while it lives."""
        return self._inner.error

    @property
    def report(self) -> SessionReport:
        """How the session came about and what it runs over."""
        return self._inner.report

    # ---- messages ------------------------------------------------------------------------------

    async def send(
        self, data: bytes | bytearray | memoryview, *, channel: str = "", borrow: bool = False
    ) -> Ticket:
        """Send one message; return when it is queued, waiting while the peer or `limits.memory` have no room.

        ``await ticket`` then waits until the peer holds it whole and verified. ``bytes`` are sent from where they are;
        anything mutable is copied first, unless ``borrow`` promises that it stays unchanged until the ticket completes.
        Where ``limits.memory`` has no room for the copy, it is sent as it is, and this returns when that is done.
        Messages of one ``channel`` are received in the order in which `send` was called.

        A coroutine that is cancelled here has sent nothing, or what it sent is cancelled.

        Raises:
            UsageError: longer than ``limits.max_message``; files and pipes have no such limit.
            AmstError: the session has ended.
        """
        self._check_loop()
        view = self._inner.message_view(data, channel)
        size = view.nbytes
        to_copy = not borrow and not isinstance(data, bytes)
        async with self._turns.setdefault(("message", channel), asyncio.Lock()):
            reserved = to_copy and await self._when_room(partial(self._core.reserve_copy, size))
            try:
                if reserved:
                    view = memoryview(view.tobytes())
                sent = await self._when_room(partial(self._inner.open_message, view, channel))
            except BaseException:
                if reserved:
                    self._core.release_copy(size)
                raise
        if reserved:
            sent.add_done_callback(lambda _: self._core.release_copy(size))
        ticket = Ticket(sent)
        if to_copy and not reserved:
            await ticket.release()
        return ticket

    async def recv(self, channel: str = "", *, timeout: float | None = None) -> memoryview:
        """The next message of ``channel``, in the order the peer sent them, waiting for it.

        The memory belongs to the caller; when its last view is dropped the session uses it again. A coroutine that is
        cancelled here takes no message with it.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            ClosedError, BrokenError: the session ended and all that had arrived was received.
        """
        self._check_loop()
        deadline = None if timeout is None else time.monotonic() + timeout
        inbox = self._core.inbox
        while True:
            arrived = Once()
            message = inbox.take(channel, arrived.tell)
            if message is not None:
                return message
            came = False
            try:
                came = await arrived.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            finally:
                if not came:
                    inbox.withdraw(channel, arrived.tell)
            if not came:
                raise DeadlineError(f"no message on channel {channel!r} within {timeout} s")

    def messages(self, channel: str = "") -> AsyncIterator[memoryview]:
        """``async for message in session.messages(channel)``: until either side closes the session.

        Raises:
            AmstError: the session ended by a fault.
        """
        return _Messages(self, channel)

    # ---- pipes -----------------------------------------------------------------------------------

    async def open_pipe(self, channel: str = "") -> PipeWriter:
        """Begin a pipe: ordered bytes of any length, written bit by bit and spread over all streams.

        The peer takes it with `accept_pipe`. Waits while the peer takes no more transfers.

        Raises:
            UsageError: ``channel`` is no name for a channel.
            AmstError: the session has ended.
        """
        self._check_loop()
        check_channel(channel)
        async with self._turns.setdefault(("pipe", channel), asyncio.Lock()):
            return PipeWriter(await self._when_room(partial(self._inner.pipes.open, channel)), self._core)

    async def accept_pipe(self, channel: str = "", *, timeout: float | None = None) -> PipeReader:
        """The next pipe of ``channel``, in the order the peer opened them, waiting for it.

        One that its writer gave up before it was accepted is passed over; cancelling this loses none.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        self._check_loop()
        pipes = self._inner.pipes
        try:
            async with asyncio.timeout(timeout):
                reader = await when_room(partial(pipes.accept, channel, None), self._core.lock, pipes.arrived)
        except TimeoutError:
            raise DeadlineError(f"no pipe on channel {channel!r} within {timeout} s", peer=self.peer) from None
        return PipeReader(reader, self._core)

    # ---- files -----------------------------------------------------------------------------------

    async def send_file(
        self, local: str | bytes | os.PathLike[str], remote: str | bytes, *, progress: Progress | None = None
    ) -> None:
        """Copy a file, link or directory to ``remote``, a path below the peer's root, and wait for it.

        ``progress`` is called on the event loop, some ten times a second and at the end. When the coroutine is
        cancelled what is under way is given up, and the peer removes what it has of it; files that had arrived stay.

        Raises:
            AmstError: the first thing that failed; what could be copied was.
        """
        await self._copy(partial(self._inner.send_file, local, remote), progress)

    async def recv_file(
        self, remote: str | bytes, local: str | bytes | os.PathLike[str], *, progress: Progress | None = None
    ) -> None:
        """Copy ``remote``, a path below the peer's root, to ``local`` and wait for it; as `send_file`."""
        await self._copy(partial(self._inner.recv_file, remote, local), progress)

    async def stat(self, remote: str | bytes, *, timeout: float | None = 60.0) -> Entry | None:
        """What is at ``remote`` below the peer's root (a link is a link), None when there is nothing."""
        self._check_loop()
        asked = self._inner.ask_stat(remote)
        await self._answer(asked, timeout)
        return self._inner.told_stat(asked, 0)

    async def list(self, remote: str | bytes, *, recursive: bool = False) -> AsyncIterator[Entry | WalkError]:
        """What is at ``remote`` below the peer's root, then what is in it, ``recursive``: all below it.

        Sorted component by component; paths are relative to ``remote``, whose own entry comes first and has none.
        A link is a link. What the peer cannot tell (no permission, no file, directory or link) comes as `WalkError`.
        Goes page by page as it is used, so that it may be of any length; what comes or goes meanwhile may be missing.

        Raises:
            NotFoundError, RefusedError: there is nothing, or it cannot be listed (by the iterator, as all errors).
            AmstError: the session ended, or the peer said what makes no sense.
        """
        self._check_loop()
        pages = Pages(remote_path(remote), recursive=recursive)
        while not pages.ended:
            async with self._list_turn:
                asked = self._inner.requests.ask(ops.LIST, pages.wish())
                try:
                    await self._answer(asked, None)
                finally:
                    asked.cancel()  # nothing, when it was answered
            for found in pages.read(asked.wait(0)):
                yield found

    # ---- streams and health ----------------------------------------------------------------------

    async def adjust_streams(self, count: int) -> int:
        """Run ``count`` streams from now on; return how many there are when that has settled.

        Cancelled, it goes on to add or remove them. Several at once take turns.

        Raises:
            UsageError: ``count`` is not within 1 and ``transport.amst.max_streams``.
            AmstError: the session has ended.
        """
        self._check_loop()
        return await in_thread(partial(self._inner.adjust_streams, count), self._errands.aside)

    async def health_check(self, timeout: float = HEALTH_TIMEOUT_S) -> HealthReport:
        """Ask the peer for a sign of life on every stream and wait for the answers; several at once take turns."""
        self._check_loop()
        return await in_thread(partial(self._inner.health_check, timeout), self._errands.aside)

    @property
    def mode(self) -> ModeState:
        """The mode that the session is in, and why."""
        return self._inner.mode

    async def force_mode(self, mode: Mode | str, *, timeout: float = MODE_TIMEOUT_S) -> None:
        """Be in ``mode``, whatever the path calls for, until `release_mode`; returns when both sides are.

        Cancelled, it goes on to change.

        Raises:
            UsageError: there is no such mode.
            RefusedError: another mode is forced at the server.
            DeadlineError: the peer has not answered within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        self._check_loop()
        await in_thread(partial(self._inner.force_mode, mode, timeout=timeout), self._errands.aside)

    def release_mode(self) -> None:
        """Have the path decide about the mode again."""
        self._inner.release_mode()

    def streams(self) -> tuple[StreamHealth, ...]:
        """Each stream's health and numbers (requirements A3); one whose lane is being replaced is not healthy."""
        return self._inner.streams()

    def metrics(self) -> SessionMetrics:
        """The session's numbers now (requirements A2, A3); works after its end too."""
        return self._inner.metrics()

    def limit_rate(self, bytes_per_s: float | None) -> None:
        """Send at most so many payload bytes per second from now on, over all streams; None: without a limit.

        Raises:
            UsageError: less than 16 KiB/s.
        """
        self._inner.limit_rate(bytes_per_s)

    async def limit_peer_rate(self, bytes_per_s: float | None, *, timeout: float | None = 60.0) -> None:
        """Have the peer send at most so many payload bytes per second to this side; as `limit_rate`.

        Raises:
            UsageError: less than 16 KiB/s.
            AmstError: the session ended, or the peer did not answer.
        """
        self._check_loop()
        asked = self._inner.ask_peer_rate(bytes_per_s)
        await self._answer(asked, timeout)
        asked.wait(0)

    # ---- the end -----------------------------------------------------------------------------------

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent so far is delivered. Cancelling this cancels no message.

        Raises:
            DeadlineError: not within ``timeout`` seconds; says how much is left.
            AmstError: the first of it that failed.
        """
        self._check_loop()
        deadline = None if timeout is None else time.monotonic() + timeout
        for ticket in self._core.unfinished():
            await Ticket(ticket).wait_only(None if deadline is None else max(0.0, deadline - time.monotonic()))
        error = self.error
        if error is not None and not isinstance(error, ClosedError):
            raise copy(error)

    async def drain(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Take nothing new and wait until all that is under way, in both directions, has ended.

        A peer that is gone is not waited for: what it sent is kept for its next try. Cancelled, it goes on to take
        nothing new.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough, or the peer is gone; says what was not finished.
        """
        self._check_loop()
        deadline = time.monotonic() + timeout
        while True:
            told = Once()
            try:
                self._inner.drained(deadline, timeout, when_room=told.tell)
                return
            except NotYet:
                pass
            try:
                await told.wait(min(DRAIN_LOOK_S, max(0.0, deadline - time.monotonic())))
            finally:
                with self._core.lock:
                    self._core.room.unwatch(told.tell)

    async def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Deliver what is under way, then end the session. Idempotent; cancelled, it aborts the session.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough; the session is ended all the same. The message says
                how much was not delivered, its ``delivery`` which transfers.
        """
        self._check_loop()
        if self._closing or self.error is not None:
            await self._ended.wait()
            return
        self._closing = True
        await in_thread(partial(self._inner.close, timeout), own_thread("close"), stop=self.abort)

    def abort(self) -> None:
        """End the session now; what is under way is dropped on both sides. Never blocks, never raises."""
        self._inner.abort()

    async def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait for the session's end, by whichever side; false when it lives on after ``timeout`` seconds."""
        self._check_loop()
        return await self._ended.wait(timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            self.abort()
            await self._ended.wait(CLOSE_TIMEOUT_S)

    # ---- inside ------------------------------------------------------------------------------------

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("a session belongs to the event loop it was opened in, and this is another one")

    async def _when_room(self, attempt: Try[T]) -> T:
        """Try until there is room."""
        return await when_room(attempt, self._core.lock, self._core.room)

    async def _answer(self, asked: PendingRequest, timeout: float | None) -> None:
        answered = Once()
        asked.add_done_callback(answered.tell)
        if not await answered.wait(timeout):
            raise asked.late(timeout)

    async def _copy(self, copying: partial[None], progress: Progress | None) -> None:
        self._check_loop()
        stop = Stop()
        reporter = None if progress is None else _Reporter(self._loop, progress)
        try:
            await in_thread(partial(copying, progress=reporter, stop=stop), own_thread("copy"), stop=stop.cancel)
        finally:
            if reporter is not None:
                reporter.close()


class _Messages:
    """The messages of one channel. A cancelled ``__anext__`` loses none: it may be called again."""

    def __init__(self, session: Session, channel: str) -> None:
        self._session = session
        self._channel = channel

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> memoryview:
        try:
            return await self._session.recv(self._channel)
        except ClosedError:
            raise StopAsyncIteration from None


class _Reporter:
    """Brings the progress of a copy to the event loop: the latest only, where that is busy."""

    def __init__(self, loop: asyncio.AbstractEventLoop, progress: Progress) -> None:
        self._loop = loop
        self._progress = progress
        self._lock = threading.Lock()
        self._latest: tuple[int, int | None] | None = None
        self._closed = False

    def __call__(self, done: int, total: int | None) -> None:
        with self._lock:
            is_due, self._latest = self._latest is not None, (done, total)
        if not is_due:
            post(self._loop, self._report)

    def _report(self) -> None:
        with self._lock:
            latest, self._latest = self._latest, None
        if self._closed or latest is None:
            return
        try:
            self._progress(*latest)
        except Exception:
            _log.exception("a progress callback of the application raised")

    def close(self) -> None:
        """Call it no more (on the loop's thread)."""
        self._closed = True
