"""A session as its users see it: send, receive, copy, adjust, watch, close."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..errors import (
    AmstError,
    ClosedError,
    DeadlineError,
    ProtocolError,
    UsageError,
    error_from_kind,
)
from ..files.entries import Entry, from_attributes, normalise_user_path
from ..files.root import Root
from ..interfaces import SessionMetrics, StreamHealth
from ..wire import requests as ops
from ..wire.frames import FrameHeader, FrameKind
from ..wire.messages import MESSAGE, Close, LaneGrant, LaneLost, LaneRequest, Message, Reply, Request
from .control_loop import ControlLoop
from .copying import ProgressCallback, download, raise_first, upload
from .core import SessionCore
from .endpoints import MemorySource
from .requests import Requests
from .service import FileService
from .telemetry import Telemetry
from .tickets import Ticket

if TYPE_CHECKING:
    from ..control.channel import ControlChannel
    from .lane_opener import LaneOpener

_log = logging.getLogger("amst.session")

CLOSE_TIMEOUT_S: Final = 30.0
"""How long `Session.close` waits for what is under way (requirements B4)."""

GOODBYE_S: Final = 2.0
"""How long the peer has to hang up after CLOSE."""

MAX_CHANNEL: Final = 255
"""Longest name of a channel, in bytes of UTF-8."""

HEALTH_TIMEOUT_S: Final = 5.0
ADJUST_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class SessionReport:
    """How the session came about and what it runs over."""

    setup_seconds: float
    encrypted: bool
    transport: str
    transport_reason: str
    most_streams: int
    acknowledged_bytes: int
    first_offered_at: float | None
    last_done_at: float | None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """Outcome of `Session.health_check`: round trips in seconds per stream, None where no answer came."""

    healthy: bool
    round_trips_s: Mapping[int, float | None]
    streams: tuple[StreamHealth, ...]


class Session:
    """Reliable, exactly-once delivery between two peers. Made by `amst_core.connect` and `amst_core.listen`.

    Every method may be called from any thread at any time. After the session has ended, each raises the
    error it ended with.
    """

    def __init__(
        self,
        core: SessionCore,
        channel: ControlChannel,
        *,
        session_id: str,
        encrypted: bool,
        root: Root | None,
        max_message: int,
        max_streams: int,
        mode: str,
        on_lane_request: Callable[[Session, LaneRequest], None],
        on_end: Callable[[Session], None],
    ) -> None:
        self.id = session_id
        self.peer = core.peer
        self.core = core
        self.opener: LaneOpener | None = None
        self.wanted_transport = ""
        self.transport_reason = ""
        self.setup_seconds = 0.0
        self._encrypted = encrypted
        self._max_message = max_message
        self.max_streams = max_streams
        self._on_lane_request = on_lane_request
        self.requests = Requests(core)
        self._service = FileService(core, root)
        self._telemetry = Telemetry(core, session_id=session_id, mode=mode)
        self._loop = ControlLoop(core, channel, self._handle, tick=self._telemetry.sample)
        self._health_checked_at: float | None = None
        self._adjusting = threading.Lock()
        core.on_failed = self._session_failed
        core.on_released = lambda: on_end(self)

    def start(self) -> None:
        """Begin to exchange messages; called once, by whoever made the session."""
        self._loop.start()

    # ---- messages ------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview, *, channel: str = "", borrow: bool = False) -> Ticket:
        """Send one message; return when it is queued.

        The ticket completes when the peer holds it whole and verified. ``bytes`` are sent from where they
        are; anything mutable is copied first, unless ``borrow`` promises that it stays unchanged until the
        ticket completes. Messages of one ``channel`` are received in the order they were sent.

        Raises:
            UsageError: longer than ``limits.max_message``; files and pipes have no such limit.
            AmstError: the session has ended.
        """
        _check_channel(channel)
        view = memoryview(data)
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        view = view.cast("B")
        if view.nbytes > self._max_message:
            raise UsageError(
                f"a message of {view.nbytes} bytes is longer than limits.max_message ({self._max_message}); "
                "send it as a file, or in several messages"
            )
        if borrow or isinstance(data, bytes):
            return self._send(view, channel)
        size = view.nbytes
        self.core.reserve_copy(size)
        try:
            ticket = self._send(memoryview(view.tobytes()), channel)
        except BaseException:
            self.core.release_copy(size)
            raise
        ticket.add_done_callback(lambda _: self.core.release_copy(size))
        return ticket

    def _send(self, view: memoryview, channel: str) -> Ticket:
        source = MemorySource(view)
        return self.core.open(MESSAGE, source, size=view.nbytes, flow=("message", channel), channel=channel)

    def recv(self, channel: str = "", *, timeout: float | None = None) -> memoryview:
        """The next message of ``channel``, in the order the peer sent them, waiting for it.

        The memory belongs to the caller; when its last view is dropped the session uses it again.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            ClosedError, BrokenError: the session ended and all that had arrived was received.
        """
        return self.core.inbox.receive(channel, timeout)

    # ---- files -----------------------------------------------------------------------------------

    def send_file(
        self,
        local: str | bytes | os.PathLike[str],
        remote: str | bytes,
        *,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """Copy a file, link or directory to ``remote``, a path below the peer's root, and wait for it.

        ``progress(bytes_done, bytes_total)`` is called from a thread of the session; the total is None until
        it is known.

        Raises:
            AmstError: the first thing that failed; what could be copied was.
        """
        raise_first(upload(self, [(local, _remote(remote))], progress=_counted(progress)))

    def recv_file(
        self,
        remote: str | bytes,
        local: str | bytes | os.PathLike[str],
        *,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """Copy ``remote``, a path below the peer's root, to ``local`` and wait for it; as `send_file`."""
        raise_first(download(self, [(_remote(remote), local)], progress=_counted(progress)))

    def stat(self, remote: str | bytes, *, timeout: float | None = 60.0) -> Entry | None:
        """What is at ``remote`` below the peer's root (a link is a link), None when there is nothing."""
        try:
            reply = self.requests.ask(ops.STAT, {ops.PATH: _remote(remote)}).wait(timeout)
        except AmstError as err:
            if err.kind == "not_found":
                return None
            raise
        size = reply.get(ops.SIZE)
        return from_attributes(reply, size=size if type(size) is int else 0)

    # ---- streams and health ----------------------------------------------------------------------

    def adjust_streams(self, count: int) -> int:
        """Run ``count`` streams from now on; return how many there are when that has settled.

        Streams are added by the side that opened the session; the other side asks it to. Removed ones
        finish what they carry first.

        Raises:
            UsageError: ``count`` is not within 1 and ``transport.amst.max_streams``.
            AmstError: the session has ended.
        """
        if not 1 <= count <= self.max_streams:
            raise UsageError(f"{count} streams: 1 to {self.max_streams} (transport.amst.max_streams) are possible")
        core = self.core
        deadline = time.monotonic() + ADJUST_TIMEOUT_S
        with self._adjusting:
            with core.lock:
                core.check_open_locked()
                core.most_wanted = count
                missing = count - len(core.live_lanes_locked()) - core.coming
                settled = core.total_lanes + core.failed_connections + core.refused_lanes
                settled += core.coming + max(0, missing)
            if missing > 0 and self.opener is not None:
                self.opener.ask(missing, self.wanted_transport)
            elif missing > 0:
                core.tell(LaneRequest(count, self.wanted_transport))
            with core.lock:
                while True:
                    core.check_open_locked()
                    live = core.live_lanes_locked()
                    for worker in live[count:]:
                        worker.leave_locked()
                    came = core.total_lanes + core.failed_connections + core.refused_lanes
                    left = deadline - time.monotonic()
                    if len(live) >= count or came >= settled or left <= 0:
                        return min(len(live), count)
                    core.room.wait(left)

    def health_check(self, timeout: float = HEALTH_TIMEOUT_S) -> HealthReport:
        """Ask the peer for a sign of life on every stream and wait for the answers.

        Touches no payload: pings travel as frames of their own, between chunks.
        """
        core = self.core
        token = time.monotonic_ns()
        deadline = time.monotonic() + timeout
        with core.lock:
            core.check_open_locked()
            workers = [w for w in core.lanes.values() if not w.leaving]
            started = time.monotonic()
            for worker in workers:
                worker.pings[token] = None
                worker.send_frame_locked(FrameHeader(FrameKind.PING, offset=token))
            while not all(w.pings[token] is not None or w.dead for w in workers):
                left = deadline - time.monotonic()
                if left <= 0 or core.error is not None:
                    break
                core.ponged.wait(left)
            answers = {w.id: w.pings.pop(token) for w in workers}
        trips = {id: None if answered is None else answered - started for id, answered in answers.items()}
        self._health_checked_at = time.monotonic()
        healthy = core.error is None and bool(trips) and all(t is not None for t in trips.values())
        return HealthReport(healthy, trips, tuple(w.health() for w in workers))

    def metrics(self) -> SessionMetrics:
        """The session's numbers now (requirements A2, A3); works after its end too."""
        return self._telemetry.read(self._health_checked_at)

    @property
    def report(self) -> SessionReport:
        """How the session came about and what it runs over."""
        core = self.core
        return SessionReport(
            setup_seconds=self.setup_seconds,
            encrypted=self._encrypted,
            transport=self.wanted_transport,
            transport_reason=self.transport_reason,
            most_streams=core.most_lanes,
            acknowledged_bytes=core.engine.bytes_acknowledged,
            first_offered_at=core.first_offered_at,
            last_done_at=core.last_done_at,
        )

    # ---- the end -----------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent so far is delivered.

        Raises:
            DeadlineError: not within ``timeout`` seconds; says how much is left.
            AmstError: the first of it that failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for ticket in self.core.unfinished():
            ticket.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if self.core.error is not None and not isinstance(self.core.error, ClosedError):
            raise copy(self.core.error)

    def drain(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Take nothing new and wait until all that is under way, in both directions, has ended.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough.
        """
        core = self.core
        deadline = time.monotonic() + timeout
        with core.lock:
            core.draining = True
            while core.error is None and (core.engine.sending or core.engine.receiving or core.serving):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError(
                        f"{core.engine.sending} transfers to and {core.engine.receiving} from {self.peer} were not "
                        f"finished within {timeout:g} s",
                        peer=self.peer,
                    )
                core.room.wait(left)

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Deliver what is under way, then end the session. Idempotent.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough; the session is ended all the same, and the
                message says how many transfers were not delivered.
        """
        late: list[Ticket] = []
        if self.core.error is None:
            deadline = time.monotonic() + timeout
            for ticket in self.core.unfinished():
                try:
                    ticket.wait(max(0.0, deadline - time.monotonic()))
                except DeadlineError:
                    if not ticket.done:
                        late.append(ticket)
                except AmstError as err:
                    _log.debug("closing; transfer %d had failed: %s", ticket.transfer, err)
        self.core.close(GOODBYE_S)
        self._join()
        if late:
            raise DeadlineError(
                f"closed with {len(late)} transfers ({sum(t.size for t in late)} bytes) not delivered to "
                f"{self.peer} within {timeout:g} s",
                peer=self.peer,
            )

    def abort(self) -> None:
        """End the session now; what is under way is dropped on both sides. Never blocks, never raises."""
        self.core.fail(ClosedError(f"this side aborted the session with {self.peer}", peer=self.peer))

    @property
    def error(self) -> AmstError | None:
        """What the session ended with; None while it lives."""
        return self.core.error

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait for the session's end, by whichever side; false when it lives on after ``timeout`` seconds."""
        return self.core.wait_ended(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
            self._join()

    # ---- inside ------------------------------------------------------------------------------------

    def _join(self) -> None:
        self.core.wait_ended(CLOSE_TIMEOUT_S)
        self._loop.join(CLOSE_TIMEOUT_S)

    def _session_failed(self, error: AmstError) -> None:
        self.requests.end(error)
        if self.opener is not None:
            self.opener.wake()

    def _handle(self, message: Message) -> None:
        """A control message (on the control loop's thread)."""
        match message:
            case LaneGrant():
                if self.opener is None:
                    raise ProtocolError("LANE_GRANT from the side that opens the lanes")
                self.opener.granted(message)
            case LaneRequest():
                self.core.most_wanted = None  # the peer's wish is the newer one
                self._on_lane_request(self, message)
            case LaneLost(incarnation, kind, text):
                told = error_from_kind(kind, f"the peer gave it up: {text}", peer=self.peer)
                self.core.lane_given_up(incarnation, told)
            case Request():
                self._service.handle(message)
            case Reply():
                self.requests.replied(message)
            case Close(kind, text):
                if kind:
                    raise error_from_kind(kind, f"{self.peer} ended the session: {text}", peer=self.peer)
                self.core.fail(ClosedError(f"{self.peer} closed the session", peer=self.peer))
            case _:
                self.core.receive(message)


def _check_channel(channel: str) -> None:
    try:
        size = len(channel.encode())
    except UnicodeEncodeError as err:
        raise UsageError(f"channel {channel!r} cannot be written as UTF-8") from err
    if size > MAX_CHANNEL:
        raise UsageError(f"a channel's name of {size} bytes; {MAX_CHANNEL} are allowed")


def _counted(progress: Callable[[int, int | None], None] | None) -> ProgressCallback | None:
    if progress is None:
        return None
    return lambda state: progress(state.bytes_done, state.bytes_total)


def _remote(path: str | bytes) -> bytes:
    return normalise_user_path(path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path)
