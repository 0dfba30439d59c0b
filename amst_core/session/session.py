"""A session as its users see it: send, receive, copy, adjust, watch, close."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..engine.engine import MAX_CHANNEL
from ..errors import (
    AmstError,
    AuthError,
    ClosedError,
    DeadlineError,
    ProtocolError,
    UsageError,
    error_from_kind,
)
from ..files.entries import Entry, WalkError, from_attributes, normalise_user_path
from ..files.partial import PartialPolicy
from ..files.root import Root
from ..interfaces import Mode, SessionMetrics, StreamHealth
from ..process import Foreign, own
from ..units import MIN_RATE
from ..wire import requests as ops
from ..wire.frames import FrameHeader, FrameKind
from ..wire.messages import (
    MESSAGE,
    Accept,
    Close,
    LaneGrant,
    LaneLost,
    LaneRequest,
    Message,
    Propose,
    Reply,
    Request,
)
from .control_loop import Connection, ControlLoop
from .copying import ProgressCallback, Stop, download, raise_first, upload
from .core import SessionCore
from .endpoints import MemorySource
from .health import LaneMonitor
from .listing import listed
from .mode import ModeKeeper, ModePlan, ModeState
from .pipes import PipeReader, Pipes, PipeWriter
from .requests import PendingRequest, Requests
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

_GONE_S: Final = 2.0

DRAIN_LOOK_S: Final = _GONE_S / 4
"""How often `drain` looks whether the peer is gone."""
"""A peer without any connection for so long is not waited for when this side stops."""

HEALTH_TIMEOUT_S: Final = 5.0
ADJUST_TIMEOUT_S: Final = 15.0
MODE_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """A session's limits, in bytes, numbers and seconds.

    ``timeout_s``: without a control channel, or without a stream, for so long it ends. ``check_interval_s``: how often
    each stream is asked for a sign of life. ``stuck_s``: how long a stream may answer nothing though its path works.
    ``partials``: what becomes of half-done files here.
    """

    max_message: int
    max_streams: int
    timeout_s: float
    check_interval_s: float
    stuck_s: float
    partials: PartialPolicy


@dataclass(frozen=True, slots=True)
class SessionReport:
    """How the session came about and what it runs over."""

    setup_seconds: float
    encrypted: bool
    verified: bool
    transport: str
    transport_reason: str
    most_streams: int
    acknowledged_bytes: int
    verified_bytes: int
    resumed_bytes: int
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
        secret: bytes,
        encrypted: bool,
        verified: bool,
        root: Root | None,
        limits: SessionLimits,
        modes: ModePlan,
        on_mode_changed: Callable[[Session, Mode, Mode, str], None],
        on_lane_request: Callable[[Session, LaneRequest], None],
        on_end: Callable[[Session], None],
    ) -> None:
        self.id = session_id
        self.secret = secret
        self.epoch = 0
        self.peer = core.peer
        self.core = core
        self.opener: LaneOpener | None = None
        self.wanted_transport = ""
        self.transport_reason = ""
        self.setup_seconds = 0.0
        self._encrypted = encrypted
        self._verified = verified
        self._max_message = limits.max_message
        self.max_streams = limits.max_streams
        self.partials = limits.partials
        self._on_lane_request = on_lane_request
        self.requests = Requests(core)
        self._service = FileService(core, root)
        self._pipes = Pipes(core)
        self._modes = ModeKeeper(core, modes, lambda old, new, why: on_mode_changed(self, old, new, why))
        self._telemetry = Telemetry(core, self._modes, session_id=session_id)
        self._monitor = LaneMonitor(core, interval_s=limits.check_interval_s, stuck_s=limits.stuck_s)
        self._loop = ControlLoop(
            core, channel, self._handle, tick=self._tick, next_tick=self._next_tick, timeout_s=limits.timeout_s
        )
        self.on_lane_lost: Callable[[int], None] | None = None
        self._epochs = threading.Lock()
        self._adjusting = threading.Lock()
        self._foreign: Foreign | None = None
        own(self)
        core.on_failed = self._session_failed
        core.on_streams_wanted = self._streams_wanted
        core.on_released = lambda: on_end(self)

    def forked(self, foreign: Foreign) -> None:
        """This is a forked child's copy: refuse to work."""
        self._foreign = foreign
        self.core = self.requests = self._telemetry = self._monitor = foreign  # type: ignore[assignment]
        self._pipes = self._modes = foreign  # type: ignore[assignment]

    def start(self) -> None:
        """Begin to exchange messages; called once, by whoever made the session."""
        self._loop.start()
        self._modes.begin()

    # ---- the control channel, when it is replaced (for `api`) ------------------------------------

    @property
    def received(self) -> int:
        """Counted messages of the peer that were taken in; stands still while there is no control channel."""
        return self._loop.received

    def redial_with(self, redial: Callable[[AmstError], None]) -> None:
        """Have ``redial`` begin to look for a new control channel whenever one is lost (the opener's side)."""
        self._loop.redial = redial

    def yield_channel(self, epoch: int, timeout_s: float) -> int:
        """Give up the control channel for the one of ``epoch``; see `handshake.Resumable`."""
        with self._epochs:
            if epoch <= self.epoch:
                raise AuthError(f"epoch {epoch} of the session is over, the last one was {self.epoch}")
            self.epoch = epoch
            # inside: whoever comes with an earlier epoch must not take the channel of a later one
            return self._loop.give_up_connection(timeout_s)

    def go_on(self, channel: ControlChannel, received: int, *, epoch: int) -> None:
        """Go on over ``channel``; the peer had taken in ``received`` messages of ours. An overtaken one is closed."""
        with self._epochs:
            if epoch == self.epoch:
                self._loop.connect(Connection(channel, received))
                return
        channel.abort()

    def _tick(self, now: float) -> None:
        self._telemetry.sample(now)
        self._monitor.tick(now)
        self.core.look_for_late(now)
        self._modes.tick(now)

    def _next_tick(self) -> float:
        return self._monitor.deadline

    # ---- messages ------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview, *, channel: str = "", borrow: bool = False) -> Ticket:
        """Send one message; return when it is queued.

        The ticket completes when the peer holds it whole and verified. ``bytes`` are sent from where they
        are; anything mutable is copied first, unless ``borrow`` promises that it stays unchanged until the
        ticket completes. Where ``limits.memory`` has no room for the copy, it is sent as it is, and this returns
        when that is done. Messages of one ``channel`` are received in the order they were sent.

        Raises:
            UsageError: longer than ``limits.max_message``; files and pipes have no such limit.
            AmstError: the session has ended.
        """
        view = self.message_view(data, channel)
        if borrow or isinstance(data, bytes):
            return self.open_message(view, channel)
        size = view.nbytes
        if not self.core.reserve_copy(size):
            ticket = self.open_message(view, channel)
            ticket.settle()
            return ticket
        try:
            ticket = self.open_message(memoryview(view.tobytes()), channel)
        except BaseException:
            self.core.release_copy(size)
            raise
        ticket.add_done_callback(lambda _: self.core.release_copy(size))
        return ticket

    def message_view(self, data: bytes | bytearray | memoryview, channel: str) -> memoryview:
        """The bytes of a message for ``channel`` (for `send`, and for `aio`); raises `UsageError` as `send` does."""
        check_channel(channel)
        view = memoryview(data)
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        view = view.cast("B")
        if view.nbytes > self._max_message:
            raise UsageError(
                f"a message of {view.nbytes} bytes is longer than limits.max_message ({self._max_message}); "
                "send it as a file, or in several messages"
            )
        return view

    def open_message(self, view: memoryview, channel: str, *, when_room: Callable[[], None] | None = None) -> Ticket:
        """Send ``view`` as it is; with ``when_room`` without waiting: see `SessionCore.open`."""
        return self.core.open(
            MESSAGE,
            MemorySource(view),
            size=view.nbytes,
            flow=("message", channel),
            channel=channel,
            when_room=when_room,
        )

    def recv(self, channel: str = "", *, timeout: float | None = None) -> memoryview:
        """The next message of ``channel``, in the order the peer sent them, waiting for it.

        The memory belongs to the caller; when its last view is dropped the session uses it again.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            ClosedError, BrokenError: the session ended and all that had arrived was received.
        """
        return self.core.inbox.receive(channel, timeout)

    # ---- pipes -----------------------------------------------------------------------------------

    @property
    def pipes(self) -> Pipes:
        """For `aio`."""
        return self._pipes

    def open_pipe(self, channel: str = "") -> PipeWriter:
        """Begin a pipe: ordered bytes of any length, written bit by bit and spread over all streams.

        The peer takes it with `accept_pipe`. Waits while the peer takes no more transfers.

        Raises:
            UsageError: ``channel`` is no name for a channel.
            AmstError: the session has ended.
        """
        check_channel(channel)
        return self._pipes.open(channel)

    def accept_pipe(self, channel: str = "", *, timeout: float | None = None) -> PipeReader:
        """The next pipe of ``channel``, in the order the peer opened them, waiting for it.

        One that its writer gave up before it was accepted is passed over.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        return self._pipes.accept(channel, timeout)

    # ---- files -----------------------------------------------------------------------------------

    def send_file(
        self,
        local: str | bytes | os.PathLike[str],
        remote: str | bytes,
        *,
        progress: Callable[[int, int | None], None] | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Copy a file, link or directory to ``remote``, a path below the peer's root, and wait for it.

        ``progress(bytes_done, bytes_total)`` is called from a thread of the session; the total is None until
        it is known. ``stop`` lets another thread end the copy early.

        Raises:
            AmstError: the first thing that failed; what could be copied was.
        """
        raise_first(upload(self, [(local, remote_path(remote))], progress=_counted(progress), stop=stop))

    def recv_file(
        self,
        remote: str | bytes,
        local: str | bytes | os.PathLike[str],
        *,
        progress: Callable[[int, int | None], None] | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Copy ``remote``, a path below the peer's root, to ``local`` and wait for it; as `send_file`."""
        raise_first(download(self, [(remote_path(remote), local)], progress=_counted(progress), stop=stop))

    def stat(self, remote: str | bytes, *, timeout: float | None = 60.0) -> Entry | None:
        """What is at ``remote`` below the peer's root (a link is a link), None when there is nothing."""
        return self.told_stat(self.ask_stat(remote), timeout)

    def ask_stat(self, remote: str | bytes) -> PendingRequest:
        """Ask what `stat` tells; give what this returns to `told_stat` once it is answered."""
        return self.requests.ask(ops.STAT, {ops.PATH: remote_path(remote)})

    def told_stat(self, asked: PendingRequest, timeout: float | None) -> Entry | None:
        """The peer's answer to `ask_stat`, waiting for it."""
        try:
            reply = asked.wait(timeout)
        except AmstError as err:
            if err.kind == "not_found":
                return None
            raise
        size = reply.get(ops.SIZE)
        return from_attributes(reply, size=size if type(size) is int else 0)

    def list(self, remote: str | bytes, *, recursive: bool = False) -> Iterator[Entry | WalkError]:
        """What is at ``remote`` below the peer's root, then what is in it, ``recursive``: all below it.

        Sorted component by component; paths are relative to ``remote``, whose own entry comes first and has none.
        A link is a link. What the peer cannot tell (no permission, no file, directory or link) comes as `WalkError`.
        Goes page by page as it is used, so that it may be of any length; what comes or goes meanwhile may be missing.

        Raises:
            NotFoundError, RefusedError: there is nothing, or it cannot be listed (by the iterator, as all errors).
            AmstError: the session ended, or the peer said what makes no sense.
        """
        return listed(self.requests, remote_path(remote), recursive=recursive)

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
        core.fix_streams(count)
        with self._adjusting:
            settled = self._wish(count)
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

    def _wish(self, count: int) -> int:
        """Ask for what is missing of ``count`` streams; how many will have come or failed when that has settled."""
        core = self.core
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
        return settled

    def _streams_wanted(self, count: int) -> None:
        """The path calls for so many streams: ask for those that are missing, let the newest go that are too many."""
        if not self._adjusting.acquire(blocking=False):
            return  # somebody says right now how many there are to be
        try:
            with self.core.lock:
                if self.core.engine.receiving and count < len(self.core.live_lanes_locked()):
                    return  # the peer may need them for what it sends
            self._wish(count)
            with self.core.lock:
                for worker in self.core.live_lanes_locked()[count:]:
                    worker.leave_locked()
        except AmstError as err:
            _log.debug("%d streams to %s are not asked for: %s", count, self.peer, err)
        finally:
            self._adjusting.release()

    @property
    def mode(self) -> ModeState:
        """The mode that the session is in, and why."""
        return self._modes.state

    def force_mode(self, mode: Mode | str, *, timeout: float = MODE_TIMEOUT_S) -> None:
        """Be in ``mode``, whatever the path calls for, until `release_mode`; returns when both sides are.

        What is under way goes on meanwhile.

        Raises:
            UsageError: there is no such mode.
            RefusedError: another mode is forced at the server.
            DeadlineError: the peer has not answered within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        self._modes.force(as_mode(mode), timeout)

    def release_mode(self) -> None:
        """Have the path decide about the mode again."""
        self._modes.release()

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
            answers = {w.stream.id: w.pings.pop(token) for w in workers if w.stream is not None}
        trips = {id: None if answered is None else answered - started for id, answered in answers.items()}
        self._monitor.checked_at = time.monotonic()
        healthy = core.error is None and bool(trips) and all(t is not None for t in trips.values())
        return HealthReport(healthy, trips, self.streams())

    def streams(self) -> tuple[StreamHealth, ...]:
        """Each stream's health and numbers (requirements A3); one whose lane is being replaced is not healthy."""
        with self.core.lock:
            shown = self.core.streams.shown()
        return tuple(stream.health() for stream in shown)

    def limit_rate(self, bytes_per_s: float | None) -> None:
        """Send at most so many payload bytes per second from now on, over all streams; None: without a limit.

        It takes the place of ``transport.amst.pacing_rate``.

        Raises:
            UsageError: less than 16 KiB/s.
        """
        if bytes_per_s is not None and bytes_per_s < MIN_RATE:
            raise UsageError(f"a limit of {bytes_per_s:g} bytes/s; {MIN_RATE} is the least")
        self.core.limit_rate(bytes_per_s)

    def limit_peer_rate(self, bytes_per_s: float | None, *, timeout: float | None = 60.0) -> None:
        """Have the peer send at most so many payload bytes per second to this side; as `limit_rate`.

        Raises:
            UsageError: less than 16 KiB/s.
            AmstError: the session ended, or the peer did not answer.
        """
        self.ask_peer_rate(bytes_per_s).wait(timeout)

    def ask_peer_rate(self, bytes_per_s: float | None) -> PendingRequest:
        """Ask for what `limit_peer_rate` waits for; raises `UsageError` as it does."""
        if bytes_per_s is not None and bytes_per_s < MIN_RATE:
            raise UsageError(f"a limit of {bytes_per_s:g} bytes/s; {MIN_RATE} is the least")
        return self.requests.ask(ops.PACE, {ops.RATE: 0 if bytes_per_s is None else int(bytes_per_s)})

    def metrics(self) -> SessionMetrics:
        """The session's numbers now (requirements A2, A3); works after its end too."""
        return self._telemetry.read(self._monitor.checked_at)

    @property
    def starved(self) -> bool:
        """The streams have taken all that they may of what was offered: with more, more could be under way."""
        return not self.core.engine.has_chunks

    @property
    def report(self) -> SessionReport:
        """How the session came about and what it runs over."""
        core = self.core
        return SessionReport(
            setup_seconds=self.setup_seconds,
            encrypted=self._encrypted,
            verified=self._verified,
            transport=self.wanted_transport,
            transport_reason=self.transport_reason,
            most_streams=core.most_lanes,
            acknowledged_bytes=core.engine.bytes_acknowledged,
            verified_bytes=core.engine.bytes_verified,
            resumed_bytes=core.engine.bytes_resumed,
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

        A peer that is gone is not waited for: what it sent is kept for its next try.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough, or the peer is gone; says what was not finished.
        """
        self.drained(time.monotonic() + timeout, timeout)

    def drained(self, deadline: float, timeout: float, *, when_room: Callable[[], None] | None = None) -> None:
        """`drain`, with ``timeout`` to name in its error; with ``when_room`` this never waits: see `Room`."""
        core = self.core
        with core.lock:
            core.draining = True
            while core.error is None and (core.engine.sending or core.engine.receiving or core.serving):
                left = deadline - time.monotonic()
                gone = core.is_gone(_GONE_S)
                if left <= 0 or gone:
                    why = "its connection was lost" if gone else f"{timeout:g} s were not enough"
                    raise DeadlineError(f"not finished with {self.peer}, for {why}: {core.describe_open_locked()}",
                                        peer=self.peer)  # fmt: skip
                core.room.wait_or_watch(when_room, min(left, DRAIN_LOOK_S))

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Deliver what is under way, then end the session. Idempotent.

        Raises:
            DeadlineError: ``timeout`` seconds were not enough; the session is ended all the same. The message says
                how much was not delivered, its ``delivery`` which transfers.
        """
        if self._foreign is not None:
            return  # the parent's session is not ours to end
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
            error = DeadlineError(
                f"closed with {len(late)} transfers ({sum(t.size for t in late)} bytes) not delivered to "
                f"{self.peer} within {timeout:g} s",
                peer=self.peer,
            )
            error.delivery = self.core.error.delivery if self.core.error is not None else None
            raise error

    def abort(self) -> None:
        """End the session now; what is under way is dropped on both sides. Never blocks, never raises."""
        if self._foreign is not None:
            return
        self.core.fail(ClosedError(f"this side aborted the session with {self.peer}", peer=self.peer))

    @property
    def error(self) -> AmstError | None:
        """What the session ended with; None while it lives."""
        return self.core.error

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait for the session's end, by whichever side; false when it lives on after ``timeout`` seconds."""
        return self.core.wait_ended(timeout)

    def add_end_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once when the session has ended and let go of all it had; at once if it has.

        It runs on a thread of the session and must return quickly.
        """
        self.core.add_end_callback(callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._foreign is None:
            self.abort()
            self._join()

    # ---- inside ------------------------------------------------------------------------------------

    def _join(self) -> None:
        self.core.wait_ended(CLOSE_TIMEOUT_S)
        self._loop.join(CLOSE_TIMEOUT_S)

    def _session_failed(self, error: AmstError) -> None:
        self.requests.end(error)
        self._pipes.end()
        self._modes.end()
        if self.opener is not None:
            self.opener.end()

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
                if self.on_lane_lost is not None:
                    self.on_lane_lost(incarnation)
            case Propose():
                self._modes.proposed(message)
            case Accept():
                self._modes.accepted(message)
            case Request():
                self._service.handle(message)
            case Reply():
                self.requests.replied(message)
            case Close(kind, text):
                ended = error_from_kind(kind, f"{self.peer} ended the session: {text}", peer=self.peer)
                closed = ClosedError(f"{self.peer} closed the session", peer=self.peer, retryable=True)
                self.core.fail(ended if kind else closed)
            case _:
                self.core.receive(message)


def as_mode(mode: Mode | str) -> Mode:
    """The mode of that name; raises `UsageError` when there is none."""
    try:
        return Mode(mode)
    except ValueError:
        raise UsageError(f"no mode {str(mode)[:32]!r}; there are {', '.join(one.value for one in Mode)}") from None


def check_channel(channel: str) -> None:
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


def remote_path(path: str | bytes) -> bytes:
    return normalise_user_path(path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path)
